"""`vllm serve` whose weights change over HTTP: what requests got is what transformers computes, whatever the client did."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from make_model import make
from replay import expected_logprobs
from safetensors.torch import load_file, save_file
from test_ways_in import _free_port, _serve, _stop, _wait_up

TOKEN = "the-operator's-own-token"
PROMPT = [7, 20, 33, 5]


class Client:
    """Requests to one server. ``old`` and ``new`` are what its weights can be."""

    def __init__(self, port: int, folder: Path, log: Path) -> None:
        self.port, self.old, self.new, self.folder, self.log = port, folder / "old", folder / "new", folder, log
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        found = json.loads(answer.read())
        connection.close()
        return answer.status, found

    def update(self, source: Path, **more: Any) -> tuple[int, Any]:
        return self.ask("POST", "/vllm_compat/update_weights", {"source": str(source), **more})

    def fleet(self, command: str, **argument: Any) -> Any:
        return self.ask("POST", "/vllm_compat/fleet", {"command": command, "argument": argument})[1]

    def version(self) -> int:
        return int(self.ask("GET", "/vllm_compat/weight_version")[1]["version"])

    def status(self) -> dict[str, Any]:
        return dict(self.ask("GET", "/vllm_compat/status")[1])

    def complete(self, tokens: int = 12) -> tuple[list[int], list[float]]:
        """Token ids and logprobs of a request at temperature 1."""
        body = {
            "model": str(self.old), "prompt": PROMPT, "max_tokens": tokens, "temperature": 1.0, "logprobs": 0, "ignore_eos": True,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        status, found = self.ask("POST", "/v1/completions", body)
        assert status == 200, found
        row = found["choices"][0]["logprobs"]
        return [int(name.removeprefix("token_id:")) for name in row["tokens"]], row["token_logprobs"]

    def has(self, weights: Path) -> bool:
        """Whether the server computes with these weights."""
        return worst(weights, weights, self.complete(), 0) < 1e-4

    def stream(self, path: str, body: dict[str, Any], chunks: list[dict[str, Any]]) -> None:
        """Adds the chunks of a streamed answer to the list, as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {
            "model": str(self.old), "stream": True, "temperature": 1.0, "ignore_eos": True, "return_tokens_as_token_ids": True,
            **body,
        }  # fmt: skip
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        lines = (line.decode().removeprefix("data: ").strip() for line in answer if line.strip())
        chunks.extend(json.loads(line) for line in lines if line != "[DONE]")
        connection.close()


def worst(old: Path, new: Path, found: tuple[list[int], list[float]], at: int, prompt: list[int] = PROMPT) -> float:
    expected = expected_logprobs(old, new, prompt, found[0], at)
    return max(abs(a - b) for a, b in zip(expected, found[1], strict=True))


@pytest.fixture(scope="module")
def server(tmp_path_factory, engine):
    """One server for all of this file, with its checkpoints below one root."""
    folder = tmp_path_factory.mktemp("roots")
    make(folder / "old", seed=0)
    make(folder / "new", seed=1)
    (folder / "nan").mkdir()
    tensors = load_file(folder / "new" / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, folder / "nan" / "model.safetensors")
    outside = tmp_path_factory.mktemp("outside")
    token, log, port = outside / "token", outside / "log", _free_port()
    token.write_text(TOKEN)
    token.chmod(0o600)
    variables = {
        "VLLM_COMPAT_PROFILE": "auto", "VLLM_COMPAT_HTTP_TOKEN_FILE": str(token), "VLLM_COMPAT_HTTP_ROOTS": str(folder),
    }  # fmt: skip
    process = _serve(folder / "old", log, port, "--max-model-len", "512", python=engine.python, **variables)
    try:
        _wait_up(process, log, port)
        yield Client(port, folder, log)
    finally:
        _stop(process)


def test_an_update_in_flight(server):
    """A request that runs goes on over its KV cache: the old weights up to one token, the new ones from it on."""
    for _ in range(5):
        before = server.version()
        old, new = (server.old, server.new) if server.has(server.old) else (server.new, server.old)
        found: dict[str, Any] = {}
        running = threading.Thread(target=lambda found=found: found.update(long=server.complete(480)))
        running.start()
        time.sleep(0.2)
        status, answer = server.update(new)
        assert (status, answer["version"]) == (200, before + 1)
        running.join()
        tokens, logprobs = found["long"]
        assert len(tokens) == 480
        expected = expected_logprobs(old, old, PROMPT, tokens, 0)
        at = next((i for i in range(480) if abs(expected[i] - logprobs[i]) > 1e-4), None)
        if at:  # not where the update came before the first token, or after the last: a busy machine's doing
            break
    assert at
    assert worst(old, new, found["long"], at) < 1e-4
    assert server.has(new)
    assert (server.version(), server.status()["proven"]) == (before + 1, True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_update_in_a_stream(server, path):
    """Each chunk has the version of each of its tokens, of every choice: they are those whose exact replay gives the logprobs."""
    for _ in range(5):
        before = server.version()
        old, new = (server.old, server.new) if server.has(server.old) else (server.new, server.old)
        chat, prompts, chunks = "chat" in path, [PROMPT, [9, 8, 7]], []
        asked = (
            {"messages": [{"role": "user", "content": "one two"}], "logprobs": True, "return_token_ids": True}
            if chat
            else {"prompt": prompts, "logprobs": 0}
        )
        running = threading.Thread(target=server.stream, args=(path, {**asked, "n": 2, "max_tokens": 480}, chunks))
        running.start()
        while not any(choice.get("token_weight_versions") for chunk in chunks for choice in chunk["choices"]):
            assert running.is_alive()
            time.sleep(0.005)
        assert server.update(new)[0] == 200
        running.join()
        # The engine can be far ahead of who reads its stream, and done before the update: such a request shows nothing.
        last = {
            choice["index"]: choice["token_weight_versions"][-1]
            for chunk in chunks
            for choice in chunk["choices"]
            if choice.get("token_weight_versions")
        }
        if before not in last.values():
            break
    else:
        pytest.fail("no update of five came before the last token of the stream")
    if chat:
        prompts = [chunks[0]["prompt_token_ids"]]
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "token_weight_versions" not in chunks[0]["choices"][0]  # it has no tokens
    for index in range(2 * len(prompts)):
        tokens, logprobs, versions = [], [], []
        for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
            said = choice.get("logprobs") or {}
            names = [one["token"] for one in said.get("content", ())] if chat else said["tokens"]
            tokens += [int(name.removeprefix("token_id:")) for name in names]
            logprobs += [one["logprob"] for one in said.get("content", ())] if chat else said["token_logprobs"]
            versions += choice.get("token_weight_versions", ())
            assert len(versions) == len(tokens)
        at = versions.index(before + 1)
        assert versions == [before] * at + [before + 1] * (480 - at)
        assert 0 < at < 480
        prompt = prompts[index // 2]
        assert worst(old, new, (tokens, logprobs), at, prompt) < 1e-4
        assert min(worst(old, new, (tokens, logprobs), at + by, prompt) for by in (-1, 1)) > 1e-3


def test_refusals_change_nothing(server):
    """Without the token, outside of the roots, and what the engine itself refuses: an error, and the weights are as before."""
    before = server.version()
    held = server.new if server.has(server.new) else server.old
    assert server.ask("GET", "/vllm_compat/status", token=None)[0] == 401
    assert server.ask("POST", "/vllm_compat/update_weights", {"source": str(server.new)}, token=TOKEN[:-1])[0] == 401
    assert server.update(Path("/etc"))[0] == 403
    status, found = server.update(server.folder / "nan", finite=True)
    assert (status, found["error"]["type"]) == (422, "update_refused")
    assert "model.norm.weight" in found["error"]["message"]
    assert "goes on with them" in found["error"]["message"]
    assert server.ask("GET", "/vllm_compat/nothing")[0] == 404
    assert server.update(server.new, version=before)[0] == 409
    assert server.version() == before
    assert server.has(held)
    assert server.status()["paused"] is None


def test_many_at_once(server):
    """Of updates that come together, some are done and the others get 409; versions count those that were done."""
    before, answers = server.version(), []
    together = threading.Barrier(6)

    def one() -> None:
        together.wait()
        answers.append(server.update(server.new)[0])

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {200, 409}
    assert server.version() == before + answers.count(200)


def test_a_client_that_leaves(server):
    """The connection is closed when the request is sent: the update is whole all the same."""
    before = server.version()
    body = json.dumps({"source": str(server.old)}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as left:
        left.sendall(
            b"POST /vllm_compat/update_weights HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode()
            + b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )  # fmt: skip
    until = time.monotonic() + 30
    while server.version() == before and time.monotonic() < until:
        time.sleep(0.05)
    assert server.version() == before + 1
    assert server.has(server.old)


def test_one_of_a_fleet(server):
    """By the coordinator, with one engine: taken, refused, and taken back when the coordinator falls silent while it rests."""
    from vllm_compat.weights.fleet import FleetUpdateError, update_engines

    before = server.version()
    (result,) = update_engines([server.url], server.new, token=TOKEN)
    assert (result.state, result.version, result.error) == ("updated", before + 1, "")
    assert server.has(server.new)
    with pytest.raises(FleetUpdateError, match="leads out of the folders") as caught:
        update_engines([server.url], "/etc", token=TOKEN)
    (result,) = caught.value.results
    assert (result.state, result.version) == ("old", before + 1)
    with pytest.raises(FleetUpdateError, match="Authorization: Bearer"):
        update_engines([server.url], server.old, token="not-this-one-either")
    with pytest.raises(FleetUpdateError, match="not finite"):
        update_engines([server.url], server.folder / "nan", token=TOKEN, finite=True)

    source = {"transport": "files", "path": str(server.old)}
    given = {"update": "u", "source": source, "version": before + 2, "timeout": 20, "lease": 3, "finite": False}
    assert server.fleet("prepare", **given)["state"] == "staged"
    assert server.update(server.old)[0] == 409
    assert server.has(server.new)  # it generates meanwhile
    assert server.fleet("commit", update="u")["state"] == "committed"
    until = time.monotonic() + 20
    while server.status()["updating"] and time.monotonic() < until:
        time.sleep(0.1)
    late = server.fleet("finish", update="u")
    assert "not committed here" in late["error"]["message"]
    assert (late["version"], late["state"]) == (before + 1, "idle")
    assert server.has(server.new)


def test_the_token_is_in_no_log(server):
    """Neither the server's log nor a report of its engine has it."""
    assert TOKEN not in server.log.read_text()
