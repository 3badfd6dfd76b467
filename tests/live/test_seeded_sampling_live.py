"""Seeded requests on the installed release: V0's rule holds wherever the request meets the engine, and not without us."""

from __future__ import annotations

SCRIPT = """
import json, sys
import vllm_compat
from vllm import LLM

if __name__ == "__main__":
    import seeded
    # 32 tokens a step: the long prompts come in pieces. Without us that stops vLLM on a CPU, so there no prompt does.
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128,
              max_logprobs=seeded.VOCAB, max_num_batched_tokens=32 if sys.argv[2] == "on" else 256, max_num_seqs=16)
    short = seeded.requests(16)
    found = {
        "alone": seeded.compared(short, seeded.generate(llm, short)),
        "beside others": seeded.compared(short, seeded.generate(llm, short + seeded.neighbors(16))),
    }
    if sys.argv[2] == "on":
        several = [(ids, {**given, "n": 3}) for ids, given in seeded.requests(8)[:6]]
        found["n=3"] = seeded.compared(several, seeded.generate(llm, several))
        long = seeded.requests(8, prompt=70)
        found["in pieces"] = seeded.compared(long, seeded.generate(llm, long))
    print("RESULT " + json.dumps([found, vllm_compat.status(llm).to_dict()["behaviors"]["seeded_sampling"]]))
"""


def test_one_rule_wherever_the_request_meets_the_engine(run_engine, model) -> None:
    """Alone, beside greedy and unseeded requests, as one of three samples, with a prompt in pieces: V0's tokens each time."""
    found, row = run_engine(SCRIPT, str(model), "on").ok().result
    assert row["state"] == "exercised"
    assert "V0's tokens" in row["evidence"][0]["saw"]
    assert {name: case["requests"] for name, case in found.items()} == {
        "alone": 12,
        "beside others": 12,
        "n=3": 18,
        "in pieces": 12,
    }
    for name, case in found.items():
        assert case["equal"] == case["requests"], name
    assert found["alone"]["tokens"] == found["beside others"]["tokens"]


def test_without_it_vllm_draws_other_noise(run_engine, model) -> None:
    """The negative control: switched off, no request gets V0's tokens."""
    found, row = run_engine(SCRIPT, str(model), "off", environment={"VLLM_COMPAT_SEEDED_SAMPLING": "0"}).ok().result
    assert row["state"] == "disabled"
    assert [case["equal"] for case in found.values()] == [0, 0]
