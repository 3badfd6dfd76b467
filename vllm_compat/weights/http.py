"""
Weight updates over HTTP: endpoints of `vllm serve`, on its own host and port, off unless the operator names a token file.

| request | body | answer |
|---|---|---|
| ``POST /vllm_compat/update_weights`` | source, version?, timeout?, finite? | version, seconds |
| ``POST /vllm_compat/fleet`` | command, argument | `vllm_compat.weights.fleet.Member` |
| ``GET /vllm_compat/weight_version`` | | version |
| ``GET /vllm_compat/status`` | | version, updating, paused, proven, last |

Every request carries ``Authorization: Bearer TOKEN``. Every refusal is ``{"error": {"type", "message"}}`` and changes nothing:
401 token, 403 a path or a transport that the operator does not allow, 404 and 405 no such endpoint, 408 a body that does not
arrive, 409 another update or an old version, 413 a body beyond `BODY` bytes, 422 a request or a source that is wrong, 501 an
engine that has no weight updates, 504 the time limit. 500: the engine failed, or is paused, and the message says which.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_compat.errors import SettingsError, VllmCompatError, WeightUpdateError
from vllm_compat.weights import fleet, transports
from vllm_compat.weights import update as updates

BODY = 65536  # bytes
TOKEN = (16, 4096)  # bytes, least and most
LONGEST = 3600.0  # seconds that an update may ask for
_DEFAULT = 600.0
_READ = 10.0  # seconds for a body to arrive
_GRACE = 30.0  # seconds for an update that ran out of time to put the old weights back
_ROOT = "/vllm_compat"


class Refused(Exception):
    """A request that is answered with an error, before anything changes."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message


def endpoints(args: Any) -> Endpoints | None:
    """The endpoints that the settings ask for, or None. ``args``: those of `vllm serve`.

    Raises SettingsError for a token file that is no secret, roots that are none, and several API servers in front of one engine.
    """
    from vllm_compat import bootstrap

    found = bootstrap.process.settings
    if found is None:
        return None
    if found.http_token_file is None:
        if found.http_roots is not None:
            raise SettingsError(
                "VLLM_COMPAT_HTTP_ROOTS without VLLM_COMPAT_HTTP_TOKEN_FILE: the endpoints are off without a token"
            )
        return None
    made = Endpoints(_token(found.http_token_file), _roots(found.http_roots), _transports(found.http_transports))
    servers = getattr(args, "api_server_count", None) or 1
    if servers > 1:
        raise SettingsError(
            f"VLLM_COMPAT_HTTP_TOKEN_FILE with {servers} API servers: each would know only its own requests and versions. Use "
            f"--api-server-count 1 (vLLM's default with data parallelism is one per replica), or unset it"
        )
    return made


def _token(file: str) -> bytes:
    where = f"VLLM_COMPAT_HTTP_TOKEN_FILE={file!r}"
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as opened:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise SettingsError(f"{where} is not a regular file")
            if found.st_uid not in (os.geteuid(), 0):
                raise SettingsError(f"{where} belongs to another user")
            if found.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise SettingsError(
                    f"{where} can be read or written by others (mode {stat.S_IMODE(found.st_mode):04o}): chmod 600"
                )
            text = opened.read(TOKEN[1] + 3)
    except OSError as error:
        raise SettingsError(f"{where} cannot be read: {error.strerror}") from None
    token = text.rstrip(b"\r\n")
    if not TOKEN[0] <= len(token) <= TOKEN[1] or not all(33 <= byte <= 126 for byte in token):
        raise SettingsError(f"{where}: a token is {TOKEN[0]} to {TOKEN[1]} visible ASCII characters on one line, without spaces")
    return token


def _roots(text: str | None) -> tuple[Path, ...]:
    found = []
    for name in (text or "").split(os.pathsep):
        if name:
            root = Path(name)
            if not root.is_absolute() or not root.is_dir() or root.resolve() == Path(root.resolve().anchor):
                raise SettingsError(f"VLLM_COMPAT_HTTP_ROOTS: {name!r} is not the absolute path of a folder below /")
            found.append(root.resolve())
    return tuple(found)


def _transports(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = sorted(set(names) - set(transports.NAMES))
    if unknown:
        raise SettingsError(
            f"VLLM_COMPAT_HTTP_TRANSPORTS: there is no weight transport {unknown[0]!r}: {', '.join(transports.NAMES)}"
        )
    return names


class Endpoints:
    """The endpoints of one server, an ASGI application. The token itself is not kept."""

    __name__ = "vllm_compat"  # vLLM logs its routes' endpoints by name

    def __init__(self, token: bytes, roots: tuple[Path, ...], allowed: tuple[str, ...]) -> None:
        self._digest = hashlib.sha256(token).digest()
        self._roots, self._allowed = roots, allowed
        self._app: Any = None
        self._running: asyncio.Task[dict[str, Any]] | None = None
        self._loading = False  # until the new weights are in: only so long may an update be cut off
        self._last: dict[str, Any] | None = None
        self._routes = {
            "update_weights": ("POST", self._update_weights),
            "fleet": ("POST", self._fleet),
            "weight_version": ("GET", self._weight_version),
            "status": ("GET", self._status),
        }

    def mount(self, app: Any) -> None:
        """Answer below ``/vllm_compat`` of this application, in front of its own routes."""
        from starlette.routing import Route

        self._app = app
        app.router.routes.insert(0, Route(_ROOT + "/{rest:path}", endpoint=self, include_in_schema=False))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        status, headers = 200, {"Cache-Control": "no-store"}
        try:
            content = await self._answer(Request(scope, receive))
        except Refused as refused:
            status, content = refused.status, {"error": {"type": refused.kind, "message": refused.message}}
            if status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            if status in (408, 413):
                headers["Connection"] = "close"  # the rest of the body is not read
        await JSONResponse(content, status, headers)(scope, receive, send)

    async def _answer(self, request: Any) -> dict[str, Any]:
        self._authorize(request)
        method, handler = self._routes.get(request.path_params["rest"], ("", None))
        if handler is None:
            raise Refused(404, "not_found", f"there is no such endpoint: {', '.join(f'{_ROOT}/{name}' for name in self._routes)}")
        if request.method != method:
            raise Refused(405, "method_not_allowed", f"this endpoint takes {method}")
        found: dict[str, Any] = await (handler(await _body(request)) if method == "POST" else handler())  # type: ignore[operator]
        return found

    def _authorize(self, request: Any) -> None:
        given = request.headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        found = hashlib.sha256(token.strip().encode("latin-1", "replace")).digest()
        if not hmac.compare_digest(found, self._digest) or scheme.lower() != "bearer":
            raise Refused(401, "unauthorized", "this endpoint wants Authorization: Bearer with the operator's token")

    def _engine(self) -> Any:
        engine = getattr(self._app.state, "engine_client", None)
        if engine is None or not hasattr(engine, "engine_core"):
            raise Refused(501, "no_engine", "the engine behind this server has no weight updates (V0's has none over HTTP)")
        return engine

    # --- GET ---------------------------------------------------------------------------------------------------------------

    async def _weight_version(self) -> dict[str, Any]:
        return {"version": updates.version_of(self._engine())}

    async def _status(self) -> dict[str, Any]:
        from vllm_compat import report

        engine = self._engine()
        known = report._engines.get(engine)
        return {
            "version": updates.version_of(engine),
            "updating": self._busy(engine),
            "paused": updates.paused_for(engine),
            "proven": bool(known and known.to_dict()["proven"]),
            "last": self._last,
        }

    # --- POST --------------------------------------------------------------------------------------------------------------

    def _busy(self, engine: Any) -> bool:
        return self._running is not None or updates.is_updating(engine) or fleet.member(engine).busy

    async def _update_weights(self, body: dict[str, Any]) -> dict[str, Any]:
        engine = self._engine()
        given = _fields(body, {"source"}, {"version", "timeout", "finite"})
        version, timeout, finite = given.get("version"), _seconds(given.get("timeout", _DEFAULT)), given.get("finite", False)
        if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
            raise Refused(422, "invalid_request", "version is an int")
        if not isinstance(finite, bool):
            raise Refused(422, "invalid_request", "finite is true or false")
        source = self._source(given["source"])
        # nothing is awaited between here and the task: the next request sees that this one runs
        if self._busy(engine):
            raise Refused(409, "update_under_way", "another weight update is under way: one at a time")
        known = updates.version_of(engine)
        if version is not None and version <= known:
            raise Refused(409, "old_version", f"weight version {version} is not newer than the engine's, {known}")
        began = time.monotonic()
        task = self._running = asyncio.create_task(self._run(engine, source, version, timeout, finite))
        task.add_done_callback(lambda done: self._ended(engine, done, began, timeout))
        # A client that goes away, and with it this handler, does not stop the update: it ends well, or is rolled back.
        await asyncio.wait({task}, timeout=timeout)
        if not task.done() and self._loading:
            task.cancel()
        await asyncio.wait({task}, timeout=_GRACE)
        if not task.done():
            raise Refused(
                504, "timeout", f"no end within {timeout:g} s; it is being taken back: GET {_ROOT}/status says how it ended"
            )
        assert self._last is not None
        if task.cancelled() or task.exception() is not None:
            error = self._last["error"]
            raise Refused(error["status"], error["type"], error["message"])
        return task.result()

    async def _run(
        self, engine: Any, source: dict[str, Any], version: int | None, timeout: float, finite: bool
    ) -> dict[str, Any]:
        began = time.monotonic()
        self._loading = True
        try:
            async with updates.weight_update(engine, version) as update:
                try:
                    await update.load(source, timeout=timeout, finite=finite)
                finally:
                    self._loading = False
        finally:
            self._loading = False
        return {"version": update.version, "seconds": round(time.monotonic() - began, 3)}

    def _ended(self, engine: Any, task: asyncio.Task[dict[str, Any]], began: float, timeout: float) -> None:
        self._running = None
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and error is None:
            self._last = task.result()
            return
        said = "; ".join(getattr(error, "__notes__", ()))
        paused = updates.paused_for(engine)
        if paused:
            status, kind, message = 500, "engine_paused", f"{paused} A complete update brings it back."
        elif task.cancelled():
            status, kind, message = 504, "timeout", "the time limit passed; the weights are as before"
        elif isinstance(error, WeightUpdateError) and time.monotonic() - began >= timeout:  # the transport's own patience
            status, kind, message = 504, "timeout", str(error)
        elif isinstance(error, VllmCompatError):
            status, kind, message = 422, "update_refused", str(error)
        else:
            status, kind, message = 500, "engine_failed", type(error).__name__
        self._last = {"error": {"status": status, "type": kind, "message": f"{message} ({said})" if said else message}}

    async def _fleet(self, body: dict[str, Any]) -> dict[str, Any]:
        engine = self._engine()
        given = _fields(body, {"command", "argument"}, set())
        command, argument = given["command"], given["argument"]
        wanted: dict[str, set[str]] = {
            "version": set(),
            "prepare": {"update", "source", "version", "timeout", "lease", "finite"},
            **{name: {"update"} for name in ("commit", "finish", "abort")},
        }
        if not isinstance(command, str) or command not in wanted or not isinstance(argument, dict):
            raise Refused(422, "invalid_request", f"command is one of {', '.join(wanted)}, and argument an object")
        argument = _fields(argument, wanted[command], set())
        if not isinstance(argument.get("update", ""), str):
            raise Refused(422, "invalid_request", "update is a string")
        if command == "prepare":
            if isinstance(argument["version"], bool) or not isinstance(argument["version"], int):
                raise Refused(422, "invalid_request", "version is an int")
            if not isinstance(argument["finite"], bool):
                raise Refused(422, "invalid_request", "finite is true or false")
            argument["timeout"], argument["lease"] = _seconds(argument["timeout"]), _seconds(argument["lease"], 2 * LONGEST)
            argument["source"] = self._source(argument["source"])
            if self._busy(engine):
                raise Refused(409, "update_under_way", "another weight update is under way: one at a time")
        found: dict[str, Any] = json.loads(await fleet.member(engine).ask_async(command, json.dumps(argument)))
        return found

    # --- what a source may be ----------------------------------------------------------------------------------------------

    def _source(self, given: Any) -> dict[str, Any]:
        if isinstance(given, str):
            given = {"transport": "files", "path": given}
        if not isinstance(given, dict):
            raise Refused(422, "invalid_request", "source is a path or a transport's object")
        name = given.get("transport")
        if not isinstance(name, str) or name not in self._allowed:
            raise Refused(403, "transport_not_allowed", f"over HTTP the operator allows: {', '.join(self._allowed) or 'none'}")
        if name != "files":
            return given
        path = given.get("path")
        if set(given) != {"transport", "path"} or not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
            raise Refused(422, "invalid_request", "a source of files has a path, absolute on the server's host")
        return {"transport": "files", "path": str(self._checkpoint(path))}

    def _checkpoint(self, given: str) -> Path:
        """The checkpoint's real path. What it links to outside of the roots is refused whether or not it exists."""
        path = self._inside(Path(given))
        if path.suffix == ".safetensors":
            _regular(path)
            return path
        try:
            if not path.is_dir():
                raise Refused(422, "no_checkpoint", "the path is neither a safetensors file nor a folder")
            names = [
                entry for entry in sorted(path.iterdir()) if entry.name.endswith((".safetensors", ".safetensors.index.json"))
            ]
        except OSError as error:
            raise Refused(422, "no_checkpoint", f"the folder cannot be read: {error.strerror}") from None
        if not any(entry.suffix == ".safetensors" for entry in names):
            raise Refused(422, "no_checkpoint", "the folder holds no safetensors file, and nothing else is read")
        for entry in names:
            _regular(self._inside(entry))
        return path

    def _inside(self, path: Path) -> Path:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in self._roots):
            raise Refused(403, "path_not_allowed", "the path leads out of the folders that the operator allows")
        return real


def _regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise Refused(422, "no_checkpoint", f"{path.name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise Refused(422, "no_checkpoint", f"{path.name} is not a regular file")


async def _body(request: Any) -> dict[str, Any]:
    from starlette.requests import ClientDisconnect

    too_long = Refused(413, "body_too_large", f"a body has at most {BODY} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:20]) > BODY:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(_READ):
            async for part in request.stream():
                data += part
                if len(data) > BODY:
                    raise too_long
    except TimeoutError:
        raise Refused(408, "body_timeout", f"the body did not arrive within {_READ:g} s") from None
    except ClientDisconnect:
        raise Refused(408, "body_timeout", "the client left") from None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(422, "invalid_request", "the body is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(422, "invalid_request", "the body is not a JSON object")
    return found


def _fields(body: Mapping[str, Any], needed: set[str], optional: set[str]) -> dict[str, Any]:
    missing, unknown = sorted(needed - set(body)), sorted(set(body) - needed - optional)
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has the unknown field {unknown[0][:50]!r}"
        raise Refused(
            422, "invalid_request", f"the request {what}; it takes {', '.join(sorted(needed | optional)) or 'no fields'}"
        )
    return dict(body)


def _seconds(value: Any, most: float = LONGEST) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise Refused(422, "invalid_request", f"a time limit is in seconds, above 0 and at most {most:g}")
    return float(value)
