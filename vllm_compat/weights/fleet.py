"""
Many engines, one weight version: all of them take an update, or none does.

One coordinator call asks every engine in three steps. *prepare*: the new weights are received beside the model and checked,
while the engine goes on generating; all engines must have received the same bytes. *commit*: the engine comes to rest, and the
weights go in; every engine keeps the old ones. *finish*: it takes the version and goes on. Until every engine has committed, a
failure anywhere puts the old weights back everywhere. Where each engine stands is in the result, or in the error.

What runs an engine on another node is Ray's, or `vllm serve`'s; this is what the engines are told.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_compat.errors import VllmCompatError, WeightUpdateError
from vllm_compat.weights import update as updates

_SLACK = 10.0  # seconds beyond a coordinator's timeout after which its part of an update is taken back
_ABORT = 30.0  # seconds that an abort is waited for


@dataclass(frozen=True)
class EngineResult:
    """One engine after `update_engines`.

    ``state``: ``updated``; ``old`` (unchanged, or its old weights are back; it generates); ``paused`` (at rest, its weights may
    be mixed: a complete update brings it back); ``unknown`` (it did not answer: ``error`` says what was asked of it last).
    ``version`` is the one that it reported last; None where it never answered. ``seconds``: the engine at rest, as seen here.
    """

    engine: str
    state: str
    version: int | None
    error: str = ""
    seconds: float = 0.0


class FleetUpdateError(WeightUpdateError):
    """An update of several engines failed. ``results``: one `EngineResult` per engine, in the order they were given in."""

    def __init__(self, message: str, results: Sequence[EngineResult]) -> None:
        self.message, self.results = message, tuple(results)
        rows = [
            f"  {one.engine}: {one.state}, version {'unknown' if one.version is None else one.version}"
            + (f": {one.error}" if one.error else "")
            for one in self.results
        ]
        super().__init__("\n".join([message, *rows]))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[EngineResult, ...]]]:
        return type(self), (self.message, self.results)  # a Ray task's error reaches its caller by pickle


def update_engines(
    engines: Sequence[Any],
    source: Any,
    version: int | None = None,
    *,
    timeout: float = 600.0,
    finite: bool = False,
    token: str | None = None,
) -> tuple[EngineResult, ...]:
    """Update all ``engines`` to one weight version, or none of them.

    ``engines``: `LLM` and `LLMEngine` objects; handles of Ray actors whose class has `RayEngine` or `AsyncRayEngine` among its
    bases; base URLs of `vllm serve` (``http://host:8000``), with the ``token`` of their operator. `AsyncLLM` objects live on
    an event loop: `update_engines_async`. ``source``: a path that every engine's workers can read, a transport's dict, or a list
    with one of them per engine. ``version``: newer than that of every engine (default: the newest + 1). ``timeout``: seconds that
    each engine has for each of the three steps. ``finite``: refuse NaN and infinity.

    Returns an `EngineResult` per engine. Raises FleetUpdateError, whose ``results`` say who has what; WeightUpdateError for
    arguments that make no sense.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise WeightUpdateError("an event loop runs here: write `await vllm_compat.update_engines_async(...)`")
    if any(_is_async(engine) for engine in engines):
        raise WeightUpdateError("an AsyncLLM runs on its event loop: write `await vllm_compat.update_engines_async(...)` there")
    return asyncio.run(update_engines_async(engines, source, version, timeout=timeout, finite=finite, token=token))


async def update_engines_async(
    engines: Sequence[Any],
    source: Any,
    version: int | None = None,
    *,
    timeout: float = 600.0,
    finite: bool = False,
    token: str | None = None,
) -> tuple[EngineResult, ...]:
    """`update_engines` on a running event loop; takes `AsyncLLM` objects of this loop too."""
    if isinstance(engines, str) or not engines:
        raise WeightUpdateError("update_engines takes a list of engines, at least one")
    if not timeout > 0:
        raise WeightUpdateError(f"timeout is in seconds, above 0, not {timeout}")
    sources = list(source) if isinstance(source, (list, tuple)) else [source] * len(engines)
    if len(sources) != len(engines):
        raise WeightUpdateError(f"{len(sources)} sources for {len(engines)} engines: give one for all, or one for each")
    doors = [_door(engine, number, token) for number, engine in enumerate(engines)]
    if len({door.key for door in doors}) < len(doors):
        raise WeightUpdateError("an engine is named twice")
    return await _Round(doors, [_as_source(one) for one in sources], timeout, finite).run(version)


def ray_runtime_env(**more: Any) -> dict[str, Any]:
    """A ``runtime_env`` that carries activation to Ray actors on other nodes: ``ray.init(runtime_env=ray_runtime_env())`` or
    ``Actor.options(runtime_env=ray_runtime_env())``.

    It holds this process's ``VLLM_COMPAT_*`` variables, and ``VLLM_COMPAT_PROFILE=auto`` where none is set, so that vLLM's plugin
    loader activates vllm_compat in an actor that does not import it. Those of the HTTP endpoints stay here: they name files of
    this host. ``more``: further fields of the runtime_env; in its ``env_vars``, yours win. The package itself is not sent: it is
    installed on every node as vLLM is, and a node without it cannot start a worker of such an engine.
    """
    from vllm_compat import settings

    ours = {
        name: value
        for name, value in settings.environ().items()
        if name in settings.variables() and not name.startswith(f"{settings.PREFIX}HTTP_")
    }
    return {**more, "env_vars": {f"{settings.PREFIX}PROFILE": "auto", **ours, **more.get("env_vars", {})}}


# --- an engine's side ---------------------------------------------------------------------------------------------------


class RayEngine:
    """Mix into the class of a Ray actor that keeps one `LLM` or `LLMEngine` in an attribute: `update_engines` can then update it.

    An actor runs one call at a time: an update waits until a ``generate`` that runs is over. For updates while requests run use
    `AsyncLLM` and `AsyncRayEngine`.
    """

    def vllm_compat_fleet(self, command: str, argument: str) -> str:
        """Called by `update_engines`: one step of an update; the answer is JSON."""
        return member(_engine_of(self)).ask(command, argument)


class AsyncRayEngine:
    """`RayEngine` for an actor that keeps an `AsyncLLM`."""

    async def vllm_compat_fleet(self, command: str, argument: str) -> str:
        """Called by `update_engines`: one step of an update; the answer is JSON."""
        return await member(_engine_of(self)).ask_async(command, argument)


def member(engine: Any) -> Member:
    """The one `Member` of an engine of this process."""
    owner = getattr(engine, "llm_engine", engine)
    if owner not in _members:
        _members[owner] = Member(owner)
    return _members[owner]


class Member:
    """One engine's part in an update of many: what `update_engines` asks, one command at a time.

    ``version`` {}; ``prepare`` {update, source, version, timeout, lease, finite}; ``commit``, ``finish``, ``abort`` {update}.
    Every answer has the engine's ``version`` and ``state``: idle, staged, committed or paused; and ``error`` {type, message}
    where it was refused or failed. A coordinator that falls silent for ``lease`` seconds has its part taken back: by itself on an
    `AsyncLLM`, at the next command on an `LLM`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self._asynchronous = _is_async(engine)
        self._thread_lock, self._task_lock = threading.Lock(), asyncio.Lock()
        self._update: updates.weight_update | None = None
        self._name = ""
        self._stage = "idle"
        self._until = 0.0
        self._lease = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._abort: asyncio.Task[str] | None = None
        self._over: collections.deque[str] = collections.deque(maxlen=64)  # updates that ended: a late command is refused

    @property
    def busy(self) -> bool:
        """Whether an update of many engines has this one in hand."""
        return self._stage != "idle" and time.monotonic() < self._until

    def ask(self, command: str, argument: str) -> str:
        """One command to a synchronous engine."""
        with self._thread_lock:
            steps = self._answer(command, argument)
            try:
                steps.send(None)
            except StopIteration as done:
                return str(done.value)
            raise AssertionError("a synchronous engine does not wait on an event loop")

    async def ask_async(self, command: str, argument: str) -> str:
        """One command to an `AsyncLLM`, on its event loop. What was begun is carried through when the caller is cancelled."""

        async def one() -> str:
            async with self._task_lock:
                return await self._answer(command, argument)

        return await asyncio.shield(asyncio.ensure_future(one()))

    async def _answer(self, command: str, argument: str) -> str:
        engine = self._engine()
        found: dict[str, Any] = {}
        try:
            if engine is None or command not in _COMMANDS:
                raise WeightUpdateError(f"there is no command {command!r} for this engine")
            given = json.loads(argument)
            if self._stage != "idle" and not self.busy:
                await self._take_back("its coordinator fell silent")
            found = await _COMMANDS[command](self, engine, **given) or {}
        except Exception as error:
            notes = "; ".join(getattr(error, "__notes__", ()))
            text = str(error) if isinstance(error, VllmCompatError) else f"{type(error).__name__}: {str(error)[:500]}"
            found = {"error": {"type": type(error).__name__, "message": f"{text} ({notes})" if notes else text}}
        state = "paused" if engine is not None and self._stage == "idle" and updates.paused_for(engine) else self._stage
        version = updates.version_of(engine) if engine is not None else 0
        return json.dumps({"version": version, "state": state, **found})

    async def _version(self, engine: Any) -> None:
        """Nothing but the answer's own fields."""

    async def _prepare(
        self, engine: Any, update: str, source: dict[str, Any], version: int, timeout: float, lease: float, finite: bool
    ) -> dict[str, Any]:
        if self._stage != "idle":
            raise WeightUpdateError("another update of several engines has this one in hand: one at a time")
        if update in self._over:
            raise WeightUpdateError("this update is over")
        block = updates.weight_update(engine, version)
        block.check()  # the lock itself is taken at the commit
        known = updates.version_of(engine)
        if version <= known:
            raise WeightUpdateError(f"weight version {version} is not newer than the engine's, {known}")
        found: dict[str, Any] = {}
        if self._asynchronous:
            from vllm_compat.proof import prove_async

            await prove_async(engine)
        await self._drive(
            block, updates.staging({"source": source, "timeout": timeout, "finite": finite, "partial": False}, found)
        )
        self._update, self._name, self._stage, self._lease = block, update, "staged", lease
        self._renew()
        return found

    async def _commit(self, engine: Any, update: str) -> None:
        block = self._of(update, "staged")
        try:
            await self._enter(block)
        except BaseException:
            await self._drive(block, updates.dropping())
            self._end()
            raise
        try:
            await self._drive(block, updates.committing())
        except BaseException as error:
            self._end()
            await self._leave(block, error)
            raise
        self._stage = "committed"
        self._renew()

    async def _finish(self, engine: Any, update: str) -> None:
        block = self._of(update, "committed")
        self._end()
        await self._leave(block, None)

    async def _give_up(self, engine: Any, update: str) -> None:
        if self._stage != "idle" and update == self._name:
            await self._take_back("the update was given up")
        elif update not in self._over:
            self._over.append(update)

    async def _take_back(self, why: str) -> None:
        block, stage = self._update, self._stage
        assert block is not None
        self._end()
        if stage == "staged":
            await self._drive(block, updates.dropping())
            return
        error = WeightUpdateError(why)
        try:
            await self._drive(block, _going_back())
        finally:
            await self._leave(block, error)

    def _of(self, update: str, stage: str) -> updates.weight_update:
        if self._update is None or update != self._name or self._stage != stage:
            raise WeightUpdateError(
                f"this update is not {stage} here: the engine is {self._stage}, or has another update in hand"
            )
        return self._update

    def _end(self) -> None:
        self._over.append(self._name)
        self._update, self._name, self._stage = None, "", "idle"
        if self._timer is not None:
            self._timer.cancel()

    def _renew(self) -> None:
        self._until = time.monotonic() + self._lease
        if self._asynchronous:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(self._lease, self._silent, self._name)

    def _silent(self, update: str) -> None:
        self._abort = asyncio.ensure_future(self.ask_async("abort", json.dumps({"update": update})))

    async def _drive(self, block: updates.weight_update, steps: updates.Steps) -> None:
        if self._asynchronous:
            await block._drive_async(steps)
        else:
            block._drive(steps)

    async def _enter(self, block: updates.weight_update) -> None:
        if self._asynchronous:
            await block.__aenter__()
        else:
            block.__enter__()

    async def _leave(self, block: updates.weight_update, error: BaseException | None) -> None:
        kind = None if error is None else type(error)
        if self._asynchronous:
            await block.__aexit__(kind, error, None)
        else:
            block.__exit__(kind, error, None)


_COMMANDS: dict[str, Callable[..., Awaitable[dict[str, Any] | None]]] = {
    "version": Member._version, "prepare": Member._prepare, "commit": Member._commit, "finish": Member._finish,
    "abort": Member._give_up,
}  # fmt: skip
_members: weakref.WeakKeyDictionary[Any, Member] = weakref.WeakKeyDictionary()


def _going_back() -> updates.Steps:
    updates.raise_first((yield "workers", "rollback", {}))


def _is_async(engine: Any) -> bool:
    owner = getattr(engine, "llm_engine", engine)
    return hasattr(owner, "engine_core") and not hasattr(owner, "step")


def _engine_of(actor: Any) -> Any:
    places = {
        "vllm.entrypoints.llm": "LLM", "vllm.v1.engine.llm_engine": "LLMEngine", "vllm.engine.llm_engine": "LLMEngine",
        "vllm.v1.engine.async_llm": "AsyncLLM",
    }  # fmt: skip
    loaded = (getattr(sys.modules.get(module), name, None) for module, name in places.items())
    classes = tuple(cls for cls in loaded if isinstance(cls, type))
    found = [value for value in vars(actor).values() if isinstance(value, classes)]
    if len(found) != 1:
        raise WeightUpdateError(
            f"{type(actor).__name__} keeps {len(found)} engines in its attributes: RayEngine wants one LLM, LLMEngine or AsyncLLM"
        )
    return found[0]


# --- the coordinator's side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Door:
    """How the coordinator reaches one engine."""

    label: str
    key: Any
    ask: Callable[[str, str, float], Awaitable[str]]


def _door(engine: Any, number: int, token: str | None) -> _Door:
    if isinstance(engine, str):
        return _served(engine, token)
    if type(engine).__module__ == "ray.actor":
        return _actor(engine, number)
    owner = getattr(engine, "llm_engine", engine)
    if not (hasattr(owner, "step") or hasattr(owner, "engine_core")):
        raise WeightUpdateError(
            f"{type(engine).__name__} is no engine: give LLM, LLMEngine or AsyncLLM objects, handles of Ray actors, or URLs"
        )
    label, mine = f"engine {number} ({type(engine).__name__})", member(owner)
    if _is_async(owner):
        return _Door(label, id(owner), lambda command, argument, _: mine.ask_async(command, argument))
    return _Door(label, id(owner), lambda command, argument, _: _in_thread(lambda: mine.ask(command, argument)))


def _actor(handle: Any, number: int) -> _Door:
    name = handle._actor_id.hex()

    async def ask(command: str, argument: str, timeout: float) -> str:
        if not hasattr(handle, "vllm_compat_fleet"):
            raise WeightUpdateError("its class has neither vllm_compat.RayEngine nor AsyncRayEngine among its bases")
        answer = handle.vllm_compat_fleet.remote(command, argument)
        return str(await asyncio.wrap_future(answer.future()))

    return _Door(f"engine {number} (Ray actor {name[:8]})", name, ask)


def _served(url: str, token: str | None) -> _Door:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise WeightUpdateError("an engine's URL is that of its server: http://host:port or https://host:port, nothing more")
    if not token:
        raise WeightUpdateError(f"{url}: the endpoints of vllm serve want the operator's token: update_engines(..., token=...)")
    import http.client

    path = parts.path.rstrip("/") + "/vllm_compat/fleet"
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def post(command: str, argument: str, timeout: float) -> str:
        # no redirect is followed: the token is for this server
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=timeout)
        try:
            body = json.dumps({"command": command, "argument": json.loads(argument)})
            connection.request("POST", path, body=body.encode(), headers=headers)
            answer = connection.getresponse()
            text = answer.read(1 << 20).decode(errors="replace")
        finally:
            connection.close()
        try:
            found = json.loads(text)
            if not isinstance(found, dict) or not {"state", "error"} & set(found):
                raise ValueError
        except ValueError:
            raise WeightUpdateError(f"HTTP {answer.status}: not an answer of vllm_compat (are its endpoints on?)") from None
        return text

    return _Door(url, url.rstrip("/"), lambda command, argument, timeout: _in_thread(lambda: post(command, argument, timeout)))


async def _in_thread(call: Callable[[], str]) -> str:
    """Run ``call`` in a thread that nobody has to wait for: an engine that hangs does not keep the program."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[str] = loop.create_future()

    def settle(set_: Callable[[Any], None], value: Any) -> None:
        def now() -> None:
            if not done.done():
                set_(value)

        if not loop.is_closed():
            loop.call_soon_threadsafe(now)

    def run() -> None:
        try:
            found = call()
        except BaseException as error:
            settle(done.set_exception, error)
        else:
            settle(done.set_result, found)

    threading.Thread(target=run, daemon=True, name="vllm_compat fleet").start()
    return await done


def _as_source(source: Any) -> dict[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        return {"transport": "files", "path": os.path.abspath(source)}
    if isinstance(source, Mapping):
        return dict(source)
    raise WeightUpdateError(f"a source is a path or a transport's dict, not {type(source).__name__}")


class _Round:
    """One update of many engines."""

    def __init__(self, doors: list[_Door], sources: list[dict[str, Any]], timeout: float, finite: bool) -> None:
        self.doors, self.sources, self.timeout, self.finite = doors, sources, timeout, finite
        self.name = uuid.uuid4().hex
        self.known: list[int | None] = [None] * len(doors)
        self.stopped = [0.0] * len(doors)  # seconds: commit asked to finish answered
        self.began = [0.0] * len(doors)

    async def run(self, version: int | None) -> tuple[EngineResult, ...]:
        answers = await self._all("version", [{}] * len(self.doors))
        self._stop_at_errors(answers, "an engine does not answer: nothing was changed", "old")
        newest = max(known for known in self.known if known is not None)
        if version is None:
            version = newest + 1
        if isinstance(version, bool) or not isinstance(version, int) or version <= newest:
            raise WeightUpdateError(f"weight version {version!r} is not newer than the newest engine's, {newest}")
        try:
            await self._prepare(version)
            answers = await self._all("commit", [{"update": self.name}] * len(self.doors))
            await self._give_up_at_errors(answers, "did not take the new weights in")
        except FleetUpdateError:
            raise
        except BaseException:  # also an interrupt, or a cancelled task
            await self._all("abort", [{"update": self.name}] * len(self.doors), _ABORT)
            raise
        answers = await self._all("finish", [{"update": self.name}] * len(self.doors))
        results = self._results(answers, lambda answer: "updated" if "error" not in answer else "paused")
        if any(one.state != "updated" for one in results):
            raise FleetUpdateError(f"THE ENGINES DIFFER: not all of them came out with version {version}", results)
        return results

    async def _prepare(self, version: int) -> None:
        lease = self.timeout + _SLACK
        given = [
            {
                "update": self.name, "source": source, "version": version, "timeout": self.timeout, "lease": lease,
                "finite": self.finite,
            }
            for source in self.sources
        ]  # fmt: skip
        answers = await self._all("prepare", given)
        await self._give_up_at_errors(answers, "did not take the update")
        sums = {(answer["checksum"], answer["tensors"]) for answer in answers}
        if len(sums) > 1:
            for answer in answers:
                answer["error"] = {"message": f"received {answer['tensors']} tensors with checksum {answer['checksum']}"}
            await self._give_up_at_errors(answers, "received other bytes than the others")

    async def _all(self, command: str, given: Sequence[Mapping[str, Any]], timeout: float | None = None) -> list[dict[str, Any]]:
        limit = min(self.timeout, timeout or self.timeout)
        # prepare has its own time limit in the worker, whose words are better
        limit += _SLACK / 2 if command == "prepare" else 0

        async def one(number: int) -> dict[str, Any]:
            door = self.doors[number]
            if command == "commit":
                self.began[number] = time.monotonic()
            try:
                text = await asyncio.wait_for(door.ask(command, json.dumps(given[number]), limit), limit)
                answer: dict[str, Any] = json.loads(text)
            except TimeoutError:
                answer = {"error": {"message": f"no answer to {command} within {limit:g} s"}, "silent": True}
            except WeightUpdateError as error:
                answer = {"error": {"message": str(error)}, "silent": True}
            except Exception as error:
                first = (str(error).strip() or "no reason given").splitlines()[0]
                answer = {"error": {"message": f"{command}: {type(error).__name__}: {first}"}, "silent": True}
            if "version" in answer:
                self.known[number] = answer["version"]
            if command in ("finish", "abort") and self.began[number]:
                self.stopped[number] = time.monotonic() - self.began[number]
            return answer

        return list(await asyncio.gather(*(one(number) for number in range(len(self.doors)))))

    def _stop_at_errors(self, answers: list[dict[str, Any]], message: str, otherwise: str) -> None:
        if any("error" in answer for answer in answers):
            raise FleetUpdateError(message, self._results(answers, lambda answer: otherwise))

    async def _give_up_at_errors(self, answers: list[dict[str, Any]], what: str) -> None:
        wrong = [number for number, answer in enumerate(answers) if "error" in answer]
        if not wrong:
            return
        after = await self._all("abort", [{"update": self.name}] * len(self.doors), _ABORT)
        for old, new in zip(answers, after, strict=True):  # the first error is the one that tells
            if "error" in old:
                text = old["error"]["message"]
                more = f"; and then: {new['error']['message']}" if "error" in new and not new.get("silent") else ""
                new["error"] = {"message": text + more}
        results = self._results(after, lambda answer: "paused" if answer.get("state") == "paused" else "old")
        who = ", ".join(self.doors[number].label for number in wrong)
        bad = [one for one in results if one.state != "old"]
        where = "every engine has its old weights" if not bad else f"{len(bad)} of {len(results)} engines are not as before"
        raise FleetUpdateError(f"{who} {what}: the update was given up, and {where}", results)

    def _results(self, answers: list[dict[str, Any]], state: Callable[[dict[str, Any]], str]) -> tuple[EngineResult, ...]:
        return tuple(
            EngineResult(
                door.label,
                "unknown" if answer.get("silent") else state(answer),
                known,
                answer.get("error", {}).get("message", ""),
                round(stopped, 3),
            )
            for door, answer, known, stopped in zip(self.doors, answers, self.known, self.stopped, strict=True)
        )
