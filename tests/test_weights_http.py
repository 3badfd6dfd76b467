"""The weight endpoints of `vllm serve`: every refusal has its status and its JSON, and reaches no engine."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_compat import bootstrap, settings
from vllm_compat.errors import SettingsError, WeightUpdateError
from vllm_compat.weights import http
from vllm_compat.weights import update as updates

TOKEN = "a-token-of-the-operator"


class Engine:
    """An asynchronous engine's surface: what the endpoints ask before the update itself."""

    engine_core = None

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={})


class Update:
    """In the place of `weight_update`: waits as told, and notes what reached it."""

    waits = 0.0
    error: BaseException | None = None
    stuck = False
    at_the_end = 0.0

    def __init__(self, engine: Any, version: int | None = None) -> None:
        self.engine, self.version = engine, version or updates.version_of(engine) + 1

    async def __aenter__(self) -> Update:
        updates._updating[self.engine] = self
        return self

    async def load(self, source: dict, **given: Any) -> None:
        calls.append((source, given))
        await asyncio.sleep(type(self).waits)
        if type(self).error:
            raise type(self).error

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        await asyncio.sleep(type(self).at_the_end)
        updates._updating.pop(self.engine, None)
        if error is None:
            self.engine.output_processor._vllm_compat_weight_version = self.version
        elif type(self).stuck:
            updates._unfinished[self.engine] = "weights may be mixed."


calls: list[tuple[dict, dict]] = []


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """``allowed`` with a checkpoint ``new`` in it, and ``outside`` with another."""
    for name in ("allowed/new", "outside/new", "allowed/pickle", "allowed/empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("allowed/new", "outside/new"):
        save_file({"weight": torch.ones(2)}, tmp_path / name / "model.safetensors")
    torch.save({"weight": torch.ones(2)}, tmp_path / "allowed/pickle/pytorch_model.bin")
    torch.save({"weight": torch.ones(2)}, tmp_path / "allowed/model.pt")
    return tmp_path


@pytest.fixture
def served(roots: Path, monkeypatch: pytest.MonkeyPatch):
    """A FastAPI application with the endpoints; called without a socket."""
    from fastapi import FastAPI

    calls.clear()
    for name, value in {"waits": 0.0, "error": None, "stuck": False, "at_the_end": 0.0}.items():
        monkeypatch.setattr(Update, name, value)
    monkeypatch.setattr(updates, "weight_update", Update)
    app = FastAPI()

    @app.get("/vllm_compat/status")
    async def somebody_elses() -> None:
        raise AssertionError("ours stands in front")

    app.state.engine_client = Engine()
    http.Endpoints(TOKEN.encode(), (roots / "allowed",), ("files",)).mount(app)
    return app


async def ask(app: Any, method: str, path: str, body: Any = None, token: str | None = TOKEN, **headers: str) -> tuple[int, Any]:
    """One request to the application: status and JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    sent = {"content-length": str(len(data)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    if token is not None:
        sent["authorization"] = f"Bearer {token}"
    raw = [(k.encode(), v.encode("latin-1")) for k, v in sent.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": f"/vllm_compat/{path}",
        "raw_path": b"", "query_string": b"", "root_path": "", "scheme": "http", "headers": raw, "server": ("x", 1), "client": ("y", 2),
    }  # fmt: skip
    parts = [data[i : i + 1000] for i in range(0, len(data), 1000)] or [b""]
    answer: dict[str, Any] = {"body": b""}

    async def receive() -> dict:
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            answer["status"], answer["headers"] = message["status"], dict(message["headers"])
        else:
            answer["body"] += message["body"]

    await app(scope, receive, send)
    return answer["status"], json.loads(answer["body"])


def refused(app: Any, status: int, kind: str, *args: Any, **more: Any) -> str:
    """The request is answered with this error, and no update began."""
    got, found = asyncio.run(ask(app, *args, **more))
    assert (got, found["error"]["type"]) == (status, kind), found
    assert set(found) == {"error"}
    assert set(found["error"]) == {"type", "message"}
    assert calls == []
    assert updates.version_of(app.state.engine_client) == 0
    assert TOKEN not in json.dumps(found)
    return found["error"]["message"]


@pytest.mark.parametrize("path", ["update_weights", "fleet", "weight_version", "status", "nothing"])
def test_every_endpoint_wants_the_token(served, path, roots):
    """None, a wrong one, a part of it, one more character, another scheme, two of them: 401, before anything else is said."""
    for token in (None, "wrong-token-of-the-operator", TOKEN[:-1], TOKEN + "x", "", "Ü" * 20):
        refused(served, 401, "unauthorized", "POST", path, {"source": str(roots / "allowed/new")}, token=token)
    refused(served, 401, "unauthorized", "GET", path, token=None, authorization=f"Basic {TOKEN}")
    refused(served, 401, "unauthorized", "GET", path, token=None, authorization=TOKEN)


def test_the_route_has_a_name(served):
    """vLLM logs every route's endpoint by its name, and does not start where one has none."""
    assert served.router.routes[0].path == "/vllm_compat/{rest:path}"
    assert served.router.routes[0].endpoint.__name__ == "vllm_compat"


def test_an_update(served, roots):
    """The source reaches `load` with the path resolved; version, status and the next default follow."""
    source = str(roots / "allowed" / "." / "new" / ".." / "new")
    assert asyncio.run(ask(served, "POST", "update_weights", {"source": source, "version": 7, "timeout": 5}))[1]["version"] == 7
    assert calls == [({"transport": "files", "path": str(roots / "allowed/new")}, {"timeout": 5.0, "finite": False})]
    file = {"transport": "files", "path": str(roots / "allowed/new/model.safetensors")}
    status, found = asyncio.run(ask(served, "POST", "update_weights", {"source": file, "finite": True}))
    assert (status, found["version"]) == (200, 8)
    assert calls[1] == (file, {"timeout": 600.0, "finite": True})
    assert asyncio.run(ask(served, "GET", "weight_version")) == (200, {"version": 8})
    status, found = asyncio.run(ask(served, "GET", "status"))
    assert (found["version"], found["updating"], found["paused"], found["last"]["version"]) == (8, False, None, 8)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("outside/new", 403),
        ("outside", 403),
        ("nowhere", 403),  # outside of the roots, whether or not it exists
        ("allowed/../outside/new", 403),
        ("allowed/new/../../outside/new/model.safetensors", 403),
        ("allowedby", 403),  # only begins like the root
        ("allowed/link", 403),
        ("allowed/link.safetensors", 403),
        ("allowed/linked", 403),
        ("allowed/loop", 422),
        ("allowed/missing", 422),
        ("allowed/missing.safetensors", 422),
        ("allowed/pickle", 422),
        ("allowed/pickle/pytorch_model.bin", 422),
        ("allowed/model.pt", 422),
        ("allowed/empty", 422),
        ("allowed/pipe", 422),
        ("allowed/pipe/model.safetensors", 422),
        ("allowed/dangling", 422),
        ("allowed/" + "x" * 300, 422),
        ("allowed/new\0", 422),
    ],
)
def test_paths(served, roots, path, status):
    """No traversal, no link out (of the path, or of a file in the folder), nothing but safetensors, no pipe."""
    (roots / "allowedby").mkdir()
    (roots / "allowed/link").symlink_to(roots / "outside/new")
    (roots / "allowed/link.safetensors").symlink_to(roots / "outside/new/model.safetensors")
    (roots / "allowed/linked").mkdir()
    (roots / "allowed/linked/model.safetensors").symlink_to(roots / "outside/new/model.safetensors")
    (roots / "allowed/loop").symlink_to(roots / "allowed/loop")
    (roots / "allowed/pipe").mkdir()
    os.mkfifo(roots / "allowed/pipe/model.safetensors")
    (roots / "allowed/dangling").mkdir()
    (roots / "allowed/dangling/model.safetensors").symlink_to(roots / "allowed/gone.safetensors")
    kind = "path_not_allowed" if status == 403 else "invalid_request" if "\0" in path else "no_checkpoint"
    refused(served, status, kind, "POST", "update_weights", {"source": f"{roots}/{path}"})
    argument = {"update": "u", "source": f"{roots}/{path}", "version": 1, "timeout": 1, "lease": 1, "finite": False}
    refused(served, status, kind, "POST", "fleet", {"command": "prepare", "argument": argument})


def test_links_inside_the_roots_are_followed(served, roots):
    """A cache that keeps its bytes in blobs works, as long as they lie below a root."""
    (roots / "allowed/blob").write_bytes((roots / "allowed/new/model.safetensors").read_bytes())
    (roots / "allowed/cached").mkdir()
    (roots / "allowed/cached/model.safetensors").symlink_to(roots / "allowed/blob")
    assert asyncio.run(ask(served, "POST", "update_weights", {"source": str(roots / "allowed/cached")}))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"\xff\xfe", b"[" * 5000, b'"a"', {}, {"version": 1}, {"source": "new"}, {"source": 3},
        {"source": None}, {"source": "PATH", "unknown": 1}, {"source": "PATH", "version": "1"}, {"source": "PATH", "version": True},
        {"source": "PATH", "version": 1.5}, {"source": "PATH", "timeout": 0}, {"source": "PATH", "timeout": -1},
        {"source": "PATH", "timeout": "5"}, {"source": "PATH", "timeout": float("nan")}, {"source": "PATH", "timeout": 1e9},
        {"source": "PATH", "timeout": True}, {"source": "PATH", "finite": 1}, {"source": {"transport": "files"}},
        {"source": {"transport": "files", "path": "PATH", "more": 1}},
    ],
)  # fmt: skip
def test_requests_that_are_wrong(served, roots, body):
    """422, and which field it is."""
    path = str(roots / "allowed/new")
    if isinstance(body, dict):
        body = json.loads(json.dumps(body).replace("PATH", path))
    message = refused(served, 422, "invalid_request", "POST", "update_weights", body)
    assert path not in message


@pytest.mark.parametrize(
    "body",
    [
        {"command": "stage", "argument": {}}, {"command": "commit", "argument": {}}, {"command": "commit", "argument": []},
        {"command": "commit"}, {"command": ["commit"], "argument": {}}, {"command": "commit", "argument": {"update": 1}},
        {"command": "prepare", "argument": {"update": "u"}},
    ],
)  # fmt: skip
def test_fleet_requests_that_are_wrong(served, body):
    """422: no command but the five, with the fields they take."""
    refused(served, 422, "invalid_request", "POST", "fleet", body)


@pytest.mark.parametrize("name", ["shared_memory", "process_group", "pickle", "", None, ["files"]])
def test_transports_that_the_operator_does_not_allow(served, name):
    """403 for all but the allowed ones."""
    refused(served, 403, "transport_not_allowed", "POST", "update_weights", {"source": {"transport": name, "path": "/"}})


def test_sizes_methods_and_addresses(served):
    """413 by the announced and by the real length, 405, 404."""
    refused(served, 413, "body_too_large", "POST", "update_weights", b" " * (http.BODY + 1))
    refused(served, 413, "body_too_large", "POST", "update_weights", b" " * (http.BODY + 1), content_length="10")
    refused(served, 413, "body_too_large", "POST", "update_weights", b"{}", content_length="-1")
    refused(served, 405, "method_not_allowed", "GET", "update_weights")
    refused(served, 405, "method_not_allowed", "POST", "status", {})
    refused(served, 404, "not_found", "GET", "")
    refused(served, 404, "not_found", "GET", "nothing")


def test_a_body_that_does_not_arrive(monkeypatch):
    """408, both for a client that dawdles and for one that leaves."""
    monkeypatch.setattr(http, "_READ", 0.05)

    class Slow:
        def __init__(self, parts: Any) -> None:
            self.headers, self.stream = {"content-length": "5"}, parts

    async def dawdle():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async def leave():
        from starlette.requests import ClientDisconnect

        raise ClientDisconnect
        yield b""

    for parts in (dawdle, leave):
        with pytest.raises(http.Refused) as caught:
            asyncio.run(http._body(Slow(parts)))
        assert caught.value.status == 408


def test_one_update_at_a_time(served, roots):
    """While one runs, others get 409 and the status says so; so does an update that is none of HTTP's."""
    Update.waits = 0.2
    body = {"source": str(roots / "allowed/new")}

    async def both() -> list:
        first = asyncio.create_task(ask(served, "POST", "update_weights", body))
        await asyncio.sleep(0.05)
        seen = [await ask(served, "POST", "update_weights", body), await ask(served, "GET", "status")]
        argument = {"update": "u", "source": body["source"], "version": 9, "timeout": 1, "lease": 1, "finite": False}
        seen.append(await ask(served, "POST", "fleet", {"command": "prepare", "argument": argument}))
        return [*seen, await first]

    second, status, prepare, first = asyncio.run(both())
    assert [second[0], prepare[0], first[0]] == [409, 409, 200]
    assert second[1]["error"]["type"] == prepare[1]["error"]["type"] == "update_under_way"
    assert status[1]["updating"] is True
    assert len(calls) == 1
    calls.clear()
    served.state.engine_client = Engine()
    updates._updating[served.state.engine_client] = Update(served.state.engine_client)
    refused(served, 409, "update_under_way", "POST", "update_weights", body)


def test_a_version_that_is_not_newer(served, roots):
    """409, before the engine is asked."""
    for version in (0, -1):
        refused(served, 409, "old_version", "POST", "update_weights", {"source": str(roots / "allowed/new"), "version": version})


def test_time_limit(served, roots):
    """504: what has not loaded in time is taken back; an update that is past that is waited for."""
    Update.waits = 5.0
    body = {"source": str(roots / "allowed/new"), "timeout": 0.1}
    status, found = asyncio.run(ask(served, "POST", "update_weights", body))
    assert (status, found["error"]["type"]) == (504, "timeout")
    assert "as before" in found["error"]["message"]
    assert updates.version_of(served.state.engine_client) == 0
    Update.waits, Update.at_the_end = 0.0, 0.3
    assert asyncio.run(ask(served, "POST", "update_weights", body))[0] == 200
    assert updates.version_of(served.state.engine_client) == 1


@pytest.mark.parametrize(("stuck", "status", "kind"), [(False, 422, "update_refused"), (True, 500, "engine_paused")])
def test_what_the_engine_refuses(served, roots, stuck, status, kind):
    """Its own words; and whether it goes on with the old weights or is paused."""
    Update.error, Update.stuck = WeightUpdateError("model.norm.weight: a NaN"), stuck
    Update.error.add_note("the old weights are back")
    got, found = asyncio.run(ask(served, "POST", "update_weights", {"source": str(roots / "allowed/new")}))
    assert (got, found["error"]["type"]) == (status, kind)
    assert "the old weights are back" in found["error"]["message"]
    assert asyncio.run(ask(served, "GET", "status"))[1]["paused"] == ("weights may be mixed." if stuck else None)


def test_an_error_of_ours_says_no_secret(served, roots):
    """An unexpected error is named by its type alone."""
    Update.error = RuntimeError("/secret/path")
    got, found = asyncio.run(ask(served, "POST", "update_weights", {"source": str(roots / "allowed/new")}))
    assert (got, found) == (500, {"error": {"type": "engine_failed", "message": "RuntimeError"}})


def test_a_client_that_leaves(served, roots):
    """The request's handler is cancelled: the update ends all the same, and the status has how."""
    Update.waits = 0.1

    async def leave() -> tuple[int, Any]:
        task = asyncio.create_task(ask(served, "POST", "update_weights", {"source": str(roots / "allowed/new")}))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert (await ask(served, "GET", "status"))[1]["updating"] is True
        await asyncio.sleep(0.2)
        return await ask(served, "GET", "status")

    found = asyncio.run(leave())[1]
    assert (found["version"], found["updating"], found["last"]["version"]) == (1, False, 1)


def test_an_engine_without_updates(served, roots):
    """501 where there is no engine (a render server), or V0's."""
    served.state.engine_client = None
    got, found = asyncio.run(ask(served, "POST", "update_weights", {"source": str(roots / "allowed/new")}))
    assert (got, found["error"]["type"]) == (501, "no_engine")


# --- the settings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def configured(roots, monkeypatch):
    """``endpoints`` under these settings, of a server started with these arguments."""
    file = roots / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)

    def make(servers: Any = None, **given: Any) -> http.Endpoints | None:
        given = {"http_token_file": str(file), "http_roots": str(roots / "allowed"), **given}
        monkeypatch.setattr(bootstrap.process, "settings", settings.Settings(**given))
        return http.endpoints(SimpleNamespace(api_server_count=servers))

    return make


def test_off_without_a_token(configured):
    """No token file, no endpoints; roots alone are a mistake that is named."""
    assert configured(http_token_file=None, http_roots=None) is None
    with pytest.raises(SettingsError, match="HTTP_ROOTS without VLLM_COMPAT_HTTP_TOKEN_FILE"):
        configured(http_token_file=None)


def test_the_token_is_not_kept(configured):
    """What is kept is its digest: neither the token nor its file's content is in the object."""
    made = configured()
    assert made is not None
    assert TOKEN not in repr(vars(made))
    assert TOKEN not in repr(bootstrap.process.settings)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o620, 0o601, 0o666])
def test_a_token_that_others_can_read(configured, roots, mode):
    """Refused by mode; 0600, 0400 and a group that may read it (0440) are not."""
    (roots / "token").chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        configured()
    for fine in (0o400, 0o440, 0o600, 0o640):
        (roots / "token").chmod(fine)
        assert configured() is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "short",
        "x" * 5000,
        "two words are no token at all",
        "line one is long enough\nline two",
        "ümlaut-is-no-token-either",
    ],
)
def test_a_token_that_is_none(configured, roots, text):
    """Length and characters; what is in the file is not repeated."""
    (roots / "token").write_text(text)
    with pytest.raises(SettingsError, match="16 to 4096 visible ASCII") as caught:
        configured()
    assert not text.strip() or text not in str(caught.value)


def test_a_token_file_that_is_none(configured, roots):
    """Not there, or a folder."""
    for path in (roots / "nowhere", roots):
        with pytest.raises(SettingsError, match="VLLM_COMPAT_HTTP_TOKEN_FILE"):
            configured(http_token_file=str(path))


@pytest.mark.parametrize("value", ["relative", "/nowhere/at/all", "/", "FILE"])
def test_roots_that_are_none(configured, roots, value):
    """Not absolute, not there, a file, or everything."""
    with pytest.raises(SettingsError, match="VLLM_COMPAT_HTTP_ROOTS"):
        configured(http_roots=value.replace("FILE", str(roots / "token")))


def test_several_roots_and_transports(configured, roots):
    """Separated as in PATH; transports by comma, and only those there are."""
    made = configured(http_roots=f"{roots / 'allowed'}{os.pathsep}{roots / 'outside'}", http_transports="files, shared_memory")
    assert made is not None
    assert made._roots == (roots / "allowed", roots / "outside")
    assert made._source({"transport": "shared_memory", "name": "x"}) == {"transport": "shared_memory", "name": "x"}
    with pytest.raises(SettingsError, match="no weight transport 'pickle'"):
        configured(http_transports="files,pickle")


def test_several_api_servers_are_refused(configured):
    """Each would know its own requests only: the server does not start."""
    assert configured(servers=1) is not None
    with pytest.raises(SettingsError, match="--api-server-count 1"):
        configured(servers=2)
