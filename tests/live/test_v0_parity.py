"""The recorded V0 engine against the installed vLLM, float32, beyond what every release shows in test_release.py."""

from __future__ import annotations

from test_release import EXACT, assert_restored

ORDER = ("top-p 0.8 min-p 0.05", "T=1.5 top-k 40 top-p 0.85 min-p 0.03", "everything")  # min-p meets top-k/top-p


def test_the_hand_made_recipe_is_not_enough(record) -> None:
    """``logprobs_mode`` by hand: prompt rows stay raw, and min-p in front of top-p keeps other tokens than V0."""
    recorded = record("off", logprobs_mode="processed_logprobs", enable_prefix_caching=False, async_scheduling=False)
    for name, kinds in recorded.gaps.items():
        sampled, prompt = kinds["sampled"], kinds["prompt"]
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
