"""Many engines, one version: whichever step fails on whichever engine, all have the old weights, or the error says who has not."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_compat.errors import WeightUpdateError
from vllm_compat.weights import fleet
from vllm_compat.weights import update as updates
from vllm_compat.weights.fleet import EngineResult, FleetUpdateError, ray_runtime_env, update_engines


class Core:
    """An engine core with one worker whose weights are a word. ``faults``: command -> message, or seconds to sleep first."""

    def __init__(self) -> None:
        self.weights = self.old = "old"
        self.staged, self.version, self.resting = "", 0, False
        self.said: list[str] = []
        self.faults: dict[str, Any] = {}

    def call_utility(self, door: str, command: str, text: str) -> str:
        argument = json.loads(text)
        if command != "workers":
            self.said.append(command)
            return json.dumps(getattr(self, command)(**argument))
        command = argument["command"]
        self.said.append(command)
        fault = self.faults.get(command)
        if isinstance(fault, float):
            time.sleep(fault)
        elif fault:
            return json.dumps([{"error": fault}])
        return json.dumps([getattr(self, f"worker_{command}")(**argument["argument"])])

    def begin(self) -> dict:
        self.resting = True
        return {"resting": True, "version": self.version}

    def resume(self) -> dict:
        self.resting = False
        return {}

    def finish(self, version: int, resume: bool) -> dict:
        if "finish" in self.faults:
            return {"problem": self.faults["finish"], "version": self.version}
        self.version, self.resting = version, not resume
        return {"problem": "", "warning": "", "version": version, "changed": []}

    def worker_baseline(self) -> dict:
        return {}

    def worker_stage(self, source: dict, timeout: float, finite: bool, partial: bool) -> dict:
        self.staged = source["path"]
        return {"checksum": source.get("bytes", source["path"]), "tensors": 1, "rank": 0}

    def worker_commit(self, keep_old: bool) -> dict:
        assert keep_old
        assert self.resting, "the weights change while steps run"
        self.old, self.weights, self.staged = self.weights, self.staged, ""
        return {}

    def worker_rollback(self) -> dict:
        self.weights, self.staged = self.old, ""
        return {}

    def worker_drop(self) -> dict:
        self.staged = ""
        return {}

    def worker_changes(self) -> dict:
        return {"changed": [] if self.weights == self.old else ["weight"]}


class Engine:
    """A synchronous engine in front of a `Core`."""

    def __init__(self) -> None:
        self.engine_core, self.output_processor = Core(), SimpleNamespace(request_states={})

    def step(self) -> None:
        """What tells it from an asynchronous one."""


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """Three of them; that they are under vllm_compat is taken for granted."""

    def check(self: updates.weight_update) -> None:
        if self.engine in updates._updating:
            raise WeightUpdateError("another weight update of this engine is under way: one at a time")

    monkeypatch.setattr(updates.weight_update, "check", check)
    return [Engine() for _ in range(3)]


def weights(engines: list[Engine]) -> list[tuple[str, int, bool, str]]:
    """Per engine: its weights, its version, whether it is at rest, what is staged."""
    return [(e.engine_core.weights, e.engine_core.version, e.engine_core.resting, e.engine_core.staged) for e in engines]


OLD = ("old", 0, False, "")
NEW = {"transport": "files", "path": "new"}


def test_all_of_them(engines):
    """Staged on all before the first comes to rest; one version, newer than the newest; the front knows it."""
    engines[1].engine_core.version = 4
    engines[1].output_processor._vllm_compat_weight_version = 4
    results = update_engines(engines, NEW)
    assert [(one.state, one.version, one.error) for one in results] == [("updated", 5, "")] * 3
    assert all(one.seconds > 0 for one in results)
    assert weights(engines) == [("new", 5, False, "")] * 3
    assert engines[0].engine_core.said == ["stage", "begin", "baseline", "commit", "finish"]
    assert update_engines(engines, NEW, version=9)[0].version == 9
    with pytest.raises(WeightUpdateError, match="version 9 is not newer than the newest engine's, 9"):
        update_engines(engines, NEW, version=9)


@pytest.mark.parametrize("step", ["stage", "commit"])
@pytest.mark.parametrize("which", [0, 2])
def test_one_that_fails_leaves_all_with_the_old_weights(engines, step, which):
    """Before and after the others have put the new weights in."""
    engines[which].engine_core.faults[step] = "model.norm.weight: a NaN"
    with pytest.raises(FleetUpdateError, match="every engine has its old weights") as caught:
        update_engines(engines, NEW)
    assert weights(engines) == [OLD] * 3
    assert [one.state for one in caught.value.results] == ["old"] * 3
    assert ["NaN" in one.error for one in caught.value.results] == [number == which for number in range(3)]
    engines[which].engine_core.faults.clear()
    assert {one.state for one in update_engines(engines, NEW)} == {"updated"}


def test_one_that_cannot_go_back_is_named(engines):
    """Its commit failed half-way and so did the way back: paused, and the others have the old weights."""
    core = engines[1].engine_core
    core.faults = {"commit": "the loader stops", "rollback": "nobody kept them"}
    core.weights = "mixed"
    with pytest.raises(FleetUpdateError, match="1 of 3 engines are not as before") as caught:
        update_engines(engines, NEW)
    assert [one.state for one in caught.value.results] == ["old", "paused", "old"]
    assert "nobody kept them" in caught.value.results[1].error
    assert [weights(engines)[number] for number in (0, 2)] == [OLD] * 2
    assert core.resting


def test_one_that_fails_at_the_end_is_named(engines):
    """Its self-test after the update: the engines differ, and the error says so first."""
    engines[2].engine_core.faults["finish"] = "fp32_lm_head: a stale head"
    with pytest.raises(FleetUpdateError, match="THE ENGINES DIFFER") as caught:
        update_engines(engines, NEW)
    assert [(one.state, one.version) for one in caught.value.results] == [("updated", 1), ("updated", 1), ("paused", 0)]
    assert "a stale head" in caught.value.results[2].error
    assert engines[2].engine_core.resting


def test_other_bytes(engines):
    """Same names and shapes, other bytes: nobody takes them."""
    sources = [NEW, NEW, {**NEW, "bytes": "others"}]
    with pytest.raises(FleetUpdateError, match="received other bytes than the others"):
        update_engines(engines, sources)
    assert weights(engines) == [OLD] * 3


@pytest.mark.parametrize("step", ["stage", "commit"])
def test_a_straggler(engines, step, monkeypatch):
    """Beyond its time: the others go on with the old weights at once, it does when it is done, and it is named."""
    monkeypatch.setattr(fleet, "_SLACK", 0.1)
    monkeypatch.setattr(fleet, "_ABORT", 0.2)
    engines[1].engine_core.faults[step] = 1.0
    began = time.monotonic()
    with pytest.raises(FleetUpdateError) as caught:
        update_engines(engines, NEW, timeout=0.3)
    assert time.monotonic() - began < 1
    assert [one.state for one in caught.value.results] == ["old", "unknown", "old"]
    assert "no answer to" in caught.value.results[1].error
    assert [weights(engines)[number] for number in (0, 2)] == [OLD] * 2
    time.sleep(1)
    assert weights(engines) == [OLD] * 3


def test_a_cancelled_coordinator_takes_its_part_back(engines):
    """Ctrl-C, or a cancelled task, while one of them still commits."""
    engines[1].engine_core.faults["commit"] = 0.5

    async def cancelled() -> None:
        task = asyncio.create_task(fleet.update_engines_async(engines, NEW))
        await asyncio.sleep(0.25)
        assert engines[0].engine_core.weights == "new"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert weights(engines) == [OLD] * 3


def test_two_coordinators(engines):
    """The second is refused, and takes nothing back that is the first's."""
    mine = fleet.member(engines[0])
    given = {"update": "first", "source": NEW, "version": 1, "timeout": 5, "lease": 5, "finite": False}
    assert json.loads(mine.ask("prepare", json.dumps(given)))["state"] == "staged"
    with pytest.raises(FleetUpdateError, match="one at a time"):
        update_engines(engines, NEW)
    assert engines[0].engine_core.staged == "new"
    assert json.loads(mine.ask("commit", '{"update": "first"}'))["state"] == "committed"
    assert json.loads(mine.ask("abort", '{"update": "second"}'))["state"] == "committed"
    assert json.loads(mine.ask("finish", '{"update": "first"}')) == {"version": 1, "state": "idle"}
    for command in ("commit", "finish"):
        assert "error" in json.loads(mine.ask(command, '{"update": "first"}'))
    assert "this update is over" in mine.ask("prepare", json.dumps({**given, "version": 2}))
    assert "no command" in mine.ask("__init__", "{}")


def test_a_coordinator_that_fell_silent(engines):
    """Its lease over, the next command finds the old weights back."""
    mine = fleet.member(engines[0])
    given = {"update": "first", "source": NEW, "version": 1, "timeout": 5, "lease": 0.05, "finite": False}
    for command, argument in (("prepare", given), ("commit", {"update": "first"})):
        assert "error" not in json.loads(mine.ask(command, json.dumps(argument)))
    assert engines[0].engine_core.resting
    time.sleep(0.1)
    assert json.loads(mine.ask("version", "{}")) == {"version": 0, "state": "idle"}
    assert weights(engines)[:1] == [OLD]


def test_arguments_that_make_no_sense(engines):
    """One error each, and no engine is asked."""
    wrong = [
        ([], NEW, {}, "at least one"), ("http://host", NEW, {}, "a list of engines"), (engines, 5, {}, "a source is a path"),
        (engines, [NEW], {}, "1 sources for 3 engines"), (engines, NEW, {"timeout": 0}, "above 0"),
        ([engines[0], engines[0]], NEW, {}, "named twice"), ([3], NEW, {}, "int is no engine"),
        (["http://host"], NEW, {}, "operator's token"), (["ftp://host"], NEW, {"token": "x"}, "http://host:port"),
        (["http://user@host"], NEW, {"token": "x"}, "http://host:port"), (["host:8000"], NEW, {"token": "x"}, "http://host:port"),
    ]  # fmt: skip
    for given, source, more, words in wrong:
        with pytest.raises(WeightUpdateError, match=words):
            update_engines(given, source, **more)
    assert [engine.engine_core.said for engine in engines] == [[], [], []]

    async def inside() -> None:
        update_engines(engines, NEW)

    with pytest.raises(WeightUpdateError, match="update_engines_async"):
        asyncio.run(inside())


def test_a_server_that_is_none_gets_the_token_once(engines):
    """A redirect is not followed, an answer that is not ours is none, and the error does not have the token."""
    import http.server

    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Silent."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(FleetUpdateError, match="HTTP 307: not an answer of vllm_compat") as caught:
            update_engines([engines[0], f"http://127.0.0.1:{server.server_port}"], NEW, token="secret-token")
    finally:
        server.shutdown()
        server.server_close()
    assert seen == [("/vllm_compat/fleet", "Bearer secret-token")]
    assert "secret-token" not in str(caught.value)
    assert [one.state for one in caught.value.results] == ["old", "unknown"]
    assert weights(engines)[:1] == [OLD]


def test_the_error_travels():
    """A Ray task's error reaches its caller by pickle."""
    error = FleetUpdateError("it failed", (EngineResult("a", "old", 3), EngineResult("b", "unknown", None, "dead")))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.results) == (str(error), error.results)
    assert "b: unknown, version unknown: dead" in str(again)


def test_an_actor_without_one_engine():
    """RayEngine finds the engine by its class, and says so where there is none."""
    answer = type("Actor", (fleet.RayEngine,), {})()
    with pytest.raises(WeightUpdateError, match="keeps 0 engines"):
        answer.vllm_compat_fleet("version", "{}")


def test_ray_runtime_env(monkeypatch):
    """Our variables, and the caller's own fields; nothing that names a secret's file here."""
    monkeypatch.setenv("VLLM_COMPAT_PROFILE", "qwen3")
    monkeypatch.setenv("VLLM_COMPAT_FP32_LM_HEAD", "0")
    monkeypatch.setenv("VLLM_COMPAT_HTTP_TOKEN_FILE", "/secret")
    monkeypatch.setenv("OTHER", "1")
    assert ray_runtime_env() == {"env_vars": {"VLLM_COMPAT_PROFILE": "qwen3", "VLLM_COMPAT_FP32_LM_HEAD": "0"}}
    found = ray_runtime_env(pip=["x"], env_vars={"VLLM_COMPAT_FP32_LM_HEAD": "1", "A": "b"})
    assert found["pip"] == ["x"]
    assert found["env_vars"] == {"VLLM_COMPAT_PROFILE": "qwen3", "VLLM_COMPAT_FP32_LM_HEAD": "1", "A": "b"}
    monkeypatch.delenv("VLLM_COMPAT_PROFILE")
    assert ray_runtime_env()["env_vars"]["VLLM_COMPAT_PROFILE"] == "auto"
