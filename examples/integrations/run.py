"""
Other people's trainers and clients, unmodified, without and with vllm_compat: `run.py [CLIENT ...]`, or `make integrations`.

Each script here is what a user of that framework writes. With vllm_compat it runs as it stands (its line ``import
vllm_compat``), or with VLLM_COMPAT_PROFILE=auto where the engine is in processes of somebody else (a server, Ray actors);
without, that line is taken out, or the variable is not set. Nothing else differs. What vllm_compat did is read from the
engine's own report (``vllm_compat.status``, as `vllm-compat doctor` sees it), while it runs.

Writes results.json and the table in docs/integrations/README.md. What it installs goes into ``--folder``, and is laid over
this Python with PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "integrations" / "README.md"
BEGIN, END = "<!-- integrations: made by `make integrations` -->", "<!-- end -->"
IMPORT = "import vllm_compat"
SECONDS = 400  # for one run of one client


@dataclass(frozen=True)
class Case:
    """One client in one setting. ``args`` follow the model's folder. ``server``: the words after the Python that starts it."""

    client: str
    setting: str
    package: str
    args: tuple[str, ...] = ()
    server: tuple[str, ...] = ()
    standins: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    shows: tuple[str, ...] = ()  # the client's metrics that go into the table

    @property
    def script(self) -> Path:
        """The file of the client."""
        return HERE / f"{self.client}.py"

    @property
    def imports(self) -> bool:
        """Whether vllm_compat comes in by the script's import; else by the environment."""
        return IMPORT in self.script.read_text(encoding="utf-8")


SERVE = ("-m", "vllm.entrypoints.cli.main", "serve", "MODEL", "--port", "PORT", "--host", "127.0.0.1", "--enforce-eager",
         "--dtype", "float32", "--max-model-len", "256", "--gpu-memory-utilization", "0.3")  # fmt: skip
TRL = (
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/mean",
)

CASES = (
    Case(
        "trl_colocate", "float32, T=0.7", "trl", args=('{"bf16": false}',), standins=("weights", "float32"), shows=TRL,
    ),
    Case(
        "trl_colocate", "bfloat16, T=0.7", "trl", standins=("weights",), shows=TRL,
    ),
    Case(
        "trl_server", "float32, T=0.7", "trl", args=("http://127.0.0.1:PORT", '{"bf16": false}'), standins=("nccl",), shows=TRL,
        server=("-m", "trl.scripts.vllm_serve", "--model", "MODEL", "--port", "PORT", "--host", "127.0.0.1",
                "--enforce_eager", "true", "--dtype", "float32", "--max_model_len", "256", "--gpu_memory_utilization", "0.3"),
    ),
    Case(
        "openai_client", "float32", "openai", args=("http://127.0.0.1:PORT/v1",), server=SERVE,
        shows=tuple(f"{one}: max |difference|" for one in ("T=1", "T=0.7", "T=0.7, top-p 0.9")),
    ),
    # the words with which SkyRL's own server starts vLLM, as its configuration has them by default
    Case(
        "skyrl_client", "float32, T=0.7", "skyrl", args=("http://127.0.0.1:PORT",), environment={"VLLM_SERVER_DEV_MODE": "1"},
        server=(*SERVE, "--enable-scale-out", "--enable-prefix-caching", "--seed", "42", "--generation-config", "vllm"),
        shows=("minibatch_rollout_logprobs_abs_diff_mean", "minibatch_rollout_logprobs_abs_diff_max"),
    ),
    Case(
        "openrlhf_rollout", "bfloat16, T=0.7, IS correction on", "openrlhf", shows=("vllm_kl", "mean |difference|"),
    ),
    Case(
        "verl_rollout", "float32, T=0.7", "verl",
        shows=tuple(f"training/rollout_{one}" for one in ("probs_diff_max", "probs_diff_mean", "actor_probs_pearson_corr")),
    ),
)  # fmt: skip


def install(folder: Path) -> Path:
    """The pinned packages and the stand-ins, once for each state of their files."""
    site, stamp = folder / "site", folder / "installed"
    files = [HERE / "requirements.txt", *sorted((HERE / "cpu_standins").glob("*.[pt]*"))]
    state = "\n".join(file.read_text(encoding="utf-8") for file in files)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != state:
        shutil.rmtree(site, ignore_errors=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            str(site),
        ]
        subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
        subprocess.run([*pip, "--no-build-isolation", str(HERE / "cpu_standins")], check=True)
        stamp.write_text(state, encoding="utf-8")
    return site


def version(site: Path, package: str) -> str:
    """Of what the child processes import."""
    found = next(iter(metadata.distributions(name=package, path=[str(site), *sys.path])))
    return found.version


def run(case: Case, site: Path, folder: Path, shimmed: bool) -> dict[str, Any]:
    """One run: the client's own metrics, and the engine's report where vllm_compat is in it."""
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "examples" / "v0_parity" / "model", folder / "model")
    lines = case.script.read_text(encoding="utf-8").splitlines(keepends=True)
    script = folder / case.script.name
    script.write_text("".join(line for line in lines if shimmed or not line.startswith(IMPORT)), encoding="utf-8")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_COMPAT_") and k != "VLLM_PLUGINS"}
    environment |= {
        "PYTHONPATH": str(site), "CPU_STANDINS": ",".join(case.standins), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false", **case.environment,
    }  # fmt: skip
    reports = folder / "reports"
    if shimmed:
        environment["VLLM_COMPAT_REPORT_DIR"] = str(reports)
        if not case.imports:
            environment["VLLM_COMPAT_PROFILE"] = "auto"

    def start(*words: str, log: str) -> subprocess.Popen[bytes]:
        words = tuple(word.replace("MODEL", str(folder / "model")).replace("PORT", port) for word in words)
        with (folder / log).open("wb") as sink:
            return subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    deadline, status, started = time.monotonic() + SECONDS, None, []
    try:
        if case.server:
            server = start(*case.server, log="server.log")
            started.append(server)
            _wait_up(server, port, deadline, folder / "server.log")
        trainer = ("-m", "cpu_standins") if "nccl" in case.standins else ()  # its end of the transport
        client = start(*trainer, str(script), "MODEL", *case.args, log="client.log")
        started.append(client)
        while client.poll() is None:
            status = _report(reports) or status
            if time.monotonic() > deadline:
                raise SystemExit(f"{case.client}: no end after {SECONDS} s: {folder / 'client.log'}")
            time.sleep(0.2)
    finally:
        for process in reversed(started):
            _stop(process)
    text = (folder / "client.log").read_text(encoding="utf-8", errors="replace")
    said = [line for line in text.splitlines() if line.startswith("RESULT ")]
    if client.returncode or not said:
        raise SystemExit(f"{case.client} ended with {client.returncode}: {folder / 'client.log'}\n{text[-3000:]}")
    if shimmed and not (status and status["proven"]):
        raise SystemExit(f"{case.client}: no engine reported itself proven: {folder / 'client.log'}")
    return {"metrics": json.loads(said[-1].removeprefix("RESULT ")), "status": status and _short(status)}


def _wait_up(server: subprocess.Popen[bytes], port: str, deadline: float, log: Path) -> None:
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the server did not come up: {log}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _report(folder: Path) -> dict[str, Any] | None:
    """What the running engine wrote for `vllm-compat doctor`; None before there is any."""
    for file in folder.glob("engine-*.json"):
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return None


def _short(status: dict[str, Any]) -> dict[str, Any]:
    """Of a report what stays the same from run to run."""
    keep = ("state", "decided_by", "route", "reason", "sets")
    behaviors = {name: {key: row[key] for key in keep} for name, row in status["behaviors"].items()}
    processes = sorted(row["role"] for row in status["processes"])
    return {key: status[key] for key in ("vllm", "profile", "proven", "notes")} | {"behaviors": behaviors, "processes": processes}


def table(results: list[dict[str, Any]]) -> str:
    """For people: every client's own metrics before and after, and what vllm_compat did."""
    rows = [
        "| client | setting | its own metric | as it comes | with vllm_compat | restored | the client's own setting, kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        behaviors = one["with"]["status"]["behaviors"]
        left = [f"`{name}`: {row['reason']}" for name, row in behaviors.items() if row["decided_by"] == "engine argument"]
        ours = {n: row for n, row in behaviors.items() if row["decided_by"] != "engine argument"}
        restored = [f"`{name}`" for name, row in ours.items() if row["state"] in ("native", "applied", "exercised")]
        for i, metric in enumerate(one["shows"]):
            before, after = (_number(one[arm]["metrics"][metric]) for arm in ("without", "with"))
            head = (f"{one['client']} ({one['package']} {one['version']})", one["setting"]) if i == 0 else ("", "")
            tail = (", ".join(restored), "; ".join(left) or "nothing") if i == 0 else ("", "")
            rows.append("| " + " | ".join((*head, metric.replace("|", "\\|"), before, after, *tail)) + " |")
    return "\n".join(rows)


def _number(values: list[float]) -> str:
    """All steps of a metric, as a range."""
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} … {high}"


def main() -> None:
    """Run the named clients, or all, and keep the results of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(dict.fromkeys(case.client for case in CASES)))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "integrations", help="where packages go")
    given = parser.parse_args()
    unknown = set(given.clients) - {case.client for case in CASES}
    if unknown:
        parser.error(f"no client {', '.join(sorted(unknown))}")
    site = install(given.folder.resolve())
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    held = {(one["client"], one["setting"]): one for one in results}
    work = tempfile.mkdtemp(prefix="integrations-")
    for number, case in enumerate(CASES):
        if given.clients and case.client not in given.clients:
            continue
        print(f"{case.client}, {case.setting}: logs in {work}/{number}", flush=True)
        arms = {arm: run(case, site, Path(work) / str(number) / arm, shimmed=arm == "with") for arm in ("without", "with")}
        held[case.client, case.setting] = {
            "client": case.client, "setting": case.setting, "package": case.package, "version": version(site, case.package),
            "vllm": metadata.version("vllm"), "standins": list(case.standins), "shows": list(case.shows), **arms,
        }  # fmt: skip
        order = {(case.client, case.setting): i for i, case in enumerate(CASES)}
        results = sorted((one for key, one in held.items() if key in order), key=lambda one: order[one["client"], one["setting"]])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if PAGE.exists():
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
