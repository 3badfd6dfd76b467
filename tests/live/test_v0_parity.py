"""The recorded V0 engine against the installed vLLM, float32: 21 settings, every token of every distribution."""

from __future__ import annotations

import pytest

# Nats. The worst cell measured is 8.4e-5, at T=0.1, which multiplies the forward pass's own rounding by ten.
EXACT = 3e-4
ORDER = ("top-p 0.8 min-p 0.05", "T=1.5 top-k 40 top-p 0.85 min-p 0.03", "everything")  # min-p meets top-k/top-p


def assert_restored(recorded, reference) -> None:
    """Every cell is exact, both distributions keep the same tokens, and greedy decoding gives the same tokens."""
    for name, (sampled, prompt) in recorded.gaps.items():
        for kind, gap in (("sampled", sampled), ("prompt", prompt)):
            assert gap.rows > 0, f"{name}: no {kind} row was compared"
            assert gap.support == 0, f"{name}, {kind} rows: {gap.support} tokens are kept by one side only"
            assert gap.max < EXACT, f"{name}, {kind} rows: {gap.max}"
    greedy = reference.settings.index("greedy")
    for prompt in range(len(reference.header["prompts"])):
        ours, theirs = recorded.found.get(greedy, prompt, "tokens"), reference.get(greedy, prompt, "tokens")
        assert ours.tolist() == theirs.tolist()


def assert_cumulative(recorded) -> None:
    """``cumulative_logprob`` is the sum of the processed logprobs of the sampled tokens."""
    for s in range(len(recorded.found.settings)):
        tokens, rows = recorded.found.get(s, 0, "tokens"), recorded.found.get(s, 0, "logprobs")
        total = sum(float(row[token]) for row, token in zip(rows, tokens))
        assert total == pytest.approx(float(recorded.found.get(s, 0, "cumulative")[0]), abs=1e-4)


def test_one_import_restores_v0(record, reference) -> None:
    """`LLM` with spawned processes: all settings in one batch meet the V0 recording, and every process says so."""
    recorded = record("auto")
    assert_restored(recorded, reference)
    assert_cumulative(recorded)
    status = recorded.status
    assert status["proven"]
    assert status["profile"] == "qwen3"
    assert [(p["role"], p["rank"]) for p in status["processes"]] == [("front", None), ("engine_core", None), ("worker", 0)]
    assert len({p["pid"] for p in status["processes"]}) == 3
    states = {name: row["state"] for name, row in status["behaviors"].items()}
    assert states == {
        "model_runner_v1": "native",
        "processed_logprobs": "exercised",
        "no_prefix_caching": "native",
        "no_async_scheduling": "native",
        "fp32_lm_head": "exercised",
        "synchronized_weight_update": "native",
        "unshared_engine_seed": "exercised",
    }


def test_v1_as_it_comes_leaves_v0(record) -> None:
    """The negative control: without vllm_compat the same comparison sees the gap, and only where there is one."""
    recorded = record("off")
    assert recorded.status is None
    for name in ("greedy", "T=1"):
        assert recorded.gaps[name][0].max < EXACT
    for name, (sampled, prompt) in recorded.gaps.items():
        if "T=0.7" in name or "T=1.5" in name or name == "everything":
            assert sampled.max > 0.1
            assert prompt.max > 0.1


def test_the_hand_made_recipe_is_not_enough(record) -> None:
    """``logprobs_mode`` by hand: prompt rows stay raw, and min-p in front of top-p keeps other tokens than V0."""
    recorded = record("off", logprobs_mode="processed_logprobs", enable_prefix_caching=False, async_scheduling=False)
    for name, (sampled, prompt) in recorded.gaps.items():
        if name in ORDER[:2]:
            assert sampled.support > 0, name
        elif name not in ORDER:
            assert sampled.support == 0, name
            assert sampled.max < EXACT, name
        if "T=0.7" in name:
            assert prompt.max > 0.1


def test_chunked_and_cached_prompts_and_your_own_arguments(record, reference) -> None:
    """Prompts scored in chunks of 16 tokens, with prefix caching switched on by the user: same values; the report names
    who decided and what it costs."""
    recorded = record("auto", "--unseeded", enable_prefix_caching=True, block_size=32, max_num_batched_tokens=16, max_num_seqs=16)
    assert_restored(recorded, reference)
    assert recorded.found.header["made_by"]["cached_prompt_tokens"] > 0
    row = recorded.status["behaviors"]["no_prefix_caching"]
    assert (row["state"], row["decided_by"]) == ("overridden", "engine argument")
    assert "older weights" in row["reason"]
    assert recorded.status["proven"]


def test_tensor_parallel(record, reference) -> None:
    """TP=2: both ranks prove their own sampler and their own shard of the head, and the rollouts are V0's."""
    recorded = record("auto", environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, tensor_parallel_size=2)
    assert_restored(recorded, reference)
    assert [(p["role"], p["rank"]) for p in recorded.status["processes"]][2:] == [("worker", 0), ("worker", 1)]
    heads = recorded.status["behaviors"]["fp32_lm_head"]["evidence"]
    assert [row["rank"] for row in heads] == [0, 1]
    assert all("float32 logits" in row["saw"] for row in heads)
