"""Every way an engine comes to be: import before and after vllm, fork, in-process, `vllm serve`; and not at all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from support import clean_environment

from vllm_compat.behaviors import ALL

OUTPUT = """
import json, sys
from vllm import LLM, SamplingParams

def answer(llm):
    params = [SamplingParams(temperature=t, top_p=0.9, max_tokens=12, seed=5, logprobs=3, prompt_logprobs=2) for t in (0.0, 0.7)]
    outs = llm.generate(["one two three"] * 2, params, use_tqdm=False)
    rows = lambda found: [None if r is None else {str(k): [v.logprob, v.rank] for k, v in r.items()} for r in found]
    return [[list(o.outputs[0].token_ids), rows(o.outputs[0].logprobs), rows(o.prompt_logprobs)] for o in outs]
"""

FORK = (
    "import vllm  # first: vllm_compat comes after it\nimport vllm_compat\nimport os\n"
    + OUTPUT
    + """
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

if __name__ == "__main__":
    args = EngineArgs(model=sys.argv[1], dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128)
    config = args.create_engine_config()
    assert args.enable_prefix_caching is None and args.logprobs_mode == "raw_logprobs" and args.seed == 0, "user's object changed"
    # the CPU platform asks for spawn; a GPU's default is fork
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    engine = LLMEngine.from_vllm_config(config)
    assert vllm_compat.status(engine).proven
    engine.add_request("a", {"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0.5, max_tokens=3, logprobs=0, prompt_logprobs=0))
    while engine.has_unfinished_requests():
        outs = engine.step()
    print(vllm_compat.status(engine))
    print("RESULT " + json.dumps(vllm_compat.status(engine).to_dict()))
"""
)


def test_fork_and_import_after_vllm(run_python, model) -> None:
    """`LLMEngine` with forked processes, vllm_compat imported after vllm."""
    status = run_python(FORK, str(model)).ok().result
    assert status["proven"]
    assert len({p["pid"] for p in status["processes"]}) == 3
    assert status["behaviors"]["processed_logprobs"]["state"] == "exercised"


SERVE_CLIENT = """
import json, sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="none")
name = client.models.list().data[0].id
found = client.completions.create(model=name, prompt=json.loads(sys.argv[2]), max_tokens=1, temperature=0.7, top_p=0.9, logprobs=5,
    extra_body={"return_tokens_as_token_ids": True})
chat = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=3, logprobs=True, top_logprobs=2)
print("RESULT " + json.dumps({"top": found.choices[0].logprobs.top_logprobs[0], "chat": len(chat.choices[0].logprobs.content),
    "versions": [answer.choices[0].model_extra["token_weight_versions"] for answer in (found, chat)]}))
"""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _serve(model: Path, log: Path, port: int, *flags: str, python: str = "", **environment: str) -> subprocess.Popen:
    vllm = [python, "-m", "vllm.entrypoints.cli.main"] if python else [str(Path(sys.executable).parent / "vllm")]
    command = [*vllm, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--gpu-memory-utilization", "0.3", *flags]
    with log.open("w") as sink:
        return subprocess.Popen(
            command, env=clean_environment(**environment), stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait_up(server: subprocess.Popen, log: Path, port: int) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-6000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(log.read_text()[-6000:])


def _stop(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def test_vllm_serve_with_the_environment_alone(run_python, model, reference, tmp_path) -> None:
    """An unmodified `vllm serve`: the OpenAI client gets V0's logprobs, and doctor sees the engine from outside."""
    log, port, reports = tmp_path / "log", _free_port(), tmp_path / "reports"
    variables = {"VLLM_COMPAT_PROFILE": "auto", "VLLM_COMPAT_REPORT_DIR": str(reports)}
    server = _serve(model, log, port, **variables)
    try:
        _wait_up(server, log, port)
        prompt = reference.prompts[0]
        found = run_python(SERVE_CLIENT, f"http://127.0.0.1:{port}/v1", json.dumps(prompt)).ok().result
        expected = reference.get(reference.settings.index("T=0.7 top-p 0.9"), 0, "logprobs")[0]
        ours = {int(token.removeprefix("token_id:")): logprob for token, logprob in found["top"].items()}
        assert len(ours) >= 5
        for token, logprob in ours.items():
            assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert found["chat"] == 3
        assert found["versions"] == [[0], [0, 0, 0]]
        doctor = [str(Path(sys.executable).parent / "vllm-compat"), "doctor", "--json"]
        seen = subprocess.run(doctor, env=clean_environment(**variables), capture_output=True, text=True, check=False)
        assert seen.returncode == 0, seen.stdout + seen.stderr
        (engine,) = json.loads(seen.stdout)["engines"]
        assert engine["proven"]
        assert "Unknown vLLM environment variable" not in log.read_text()
        assert f"{len(ALL)} behaviors of V0 in force in 3 processes" in log.read_text()
    finally:
        _stop(server)


def test_vllm_serve_refuses_to_come_up_unproven(model, tmp_path) -> None:
    """Strict under `vllm serve`: what cannot be had stops the server with our error, before it is healthy."""
    log, port = tmp_path / "log", _free_port()
    server = _serve(model, log, port, VLLM_COMPAT_PROFILE="no-such-profile")
    try:
        assert server.wait(120) != 0
    finally:
        _stop(server)
    assert "ProfileError: no profile 'no-such-profile'" in log.read_text()


REPLICAS = """
import asyncio, json, sys
import vllm_compat
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=sys.argv[1], enforce_eager=True, gpu_memory_utilization=0.3,
        max_model_len=128, data_parallel_size=2))
    found = {}
    async def ask(replica):
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        async for out in engine.generate("abc", params, f"r{replica}", data_parallel_rank=replica):
            found[replica] = list(out.outputs[0].token_ids)
    await asyncio.gather(ask(0), ask(1))
    status = (await vllm_compat.status(engine)).to_dict()
    print("RESULT " + json.dumps([found[0], found[1], status]))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_data_parallel_replicas_do_not_share_a_seed(run_python, model) -> None:
    """Two replicas inside one `AsyncLLM`: both prove themselves, and answer one prompt with different samples."""
    found = run_python(REPLICAS, str(model), environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}).ok().result
    first, second, status = found
    assert first != second
    assert status["proven"]
    assert [p["role"] for p in status["processes"]] == ["front", "engine_core", "worker", "engine_core", "worker"]
    seeds = [row["saw"] for row in status["behaviors"]["unshared_engine_seed"]["evidence"]]
    assert len(seeds) == 2
    assert "replica 1" in seeds[1]


SEEDS = """
import json, sys, vllm_compat
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    outs = []
    for _ in range(2):
        llm = LLM(model=sys.argv[1], enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128)
        (out,) = llm.generate(["abc"], SamplingParams(max_tokens=24, ignore_eos=True), use_tqdm=False)
        outs.append([list(out.outputs[0].token_ids), vllm_compat.status(llm).to_dict()["behaviors"]["unshared_engine_seed"]])
        llm.llm_engine.engine_core.shutdown()
        del llm
    print("RESULT " + json.dumps(outs))
"""


def test_engines_do_not_share_a_seed(run_python, model) -> None:
    """Two engines that were given no seed draw different samples, and the report shows both seeds."""
    (first, one), (second, two) = run_python(SEEDS, str(model)).ok().result
    assert first != second
    assert one["evidence"][0]["saw"] != two["evidence"][0]["saw"]
    assert one["evidence"][0]["saw"].startswith("seed=")


UNPROVEN = """
import json, sys, vllm_compat
from vllm.engine.arg_utils import EngineArgs

if __name__ == "__main__":
    for _ in range(2):
        config = EngineArgs(model=sys.argv[1], enforce_eager=True, max_model_len=128).create_engine_config()
    print("RESULT " + json.dumps(json.loads(config.additional_config["vllm_compat"])["notes"]))
"""


def test_a_model_without_evidence_says_so_once(run_python, model) -> None:
    """The profile default has none: one line in the log for two configurations, and a note in each report; qwen3 has some."""
    said = "has no evidence on vLLM 0.32.0, cpu"
    ran = run_python(UNPROVEN, str(model), environment={"VLLM_COMPAT_PROFILE": "default"}).ok()
    logged = [line for line in ran.text.splitlines() if not line.startswith("RESULT ")]
    assert sum(f"vllm_compat: profile default {said}" in line for line in logged) == 1
    assert any(said in note for note in ran.result)
    ran = run_python(UNPROVEN, str(model)).ok()
    assert said not in ran.text
    assert not any(said in note for note in ran.result)
