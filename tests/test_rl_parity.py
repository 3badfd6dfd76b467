"""The training study's own arithmetic: task, objectives, schedules, and the test that tells curves apart."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import objectives
import parity
import pytest
import smoke
import study
import task
import torch
from objectives import OBJECTIVES


def test_a_demonstration_without_slips_is_right_and_slips_are_as_frequent_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards come from the text alone; a slip makes one answer in two wrong or more, no slip makes none."""
    rng = random.Random(0)
    problems = [task.problem(rng) for _ in range(400)]
    slipped = [one.reward(one.demonstration(rng)) for one in problems]
    assert 0.15 < np.mean(slipped) < 0.4
    monkeypatch.setattr(task, "SLIP", 0.0)
    monkeypatch.setattr(task, "SKIP", 0.0)
    assert all(one.reward(one.demonstration(rng)) == 1 for one in problems)


def test_an_answer_that_did_not_end_earns_nothing() -> None:
    """Cut off by the token limit, empty, or with another sum."""
    one = task.Problem((7, 5))
    right = [*task.encode("a7:7,b5:2.2"), task.EOS]
    assert one.reward(right) == 1
    assert one.reward(right[:-1]) == 0
    assert one.reward([]) == 0
    assert one.reward([*task.encode("a7:7,b5:3.3"), task.EOS]) == 0
    assert task.decode(one.prompt).endswith("a7b5>")


def test_every_prompt_and_answer_fits_the_engine() -> None:
    """The longest problem with the longest answer stays below max_model_len."""
    longest = task.Problem((9,) * task.ITEMS[1])
    assert len(longest.prompt) + task.MOST_TOKENS <= 160
    assert len(longest.demonstration(random.Random(0))) <= task.MOST_TOKENS


def test_group_advantages_are_centred_within_each_group() -> None:
    """(reward - mean) / deviation of the group; nothing to learn where all are alike."""
    found = objectives.group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    assert found.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), 0, 0], abs=1e-4)


def test_generalized_advantages_equal_the_sum_they_are_defined_as(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equation 16 of the paper, summed directly, for sequences of two lengths; returns are advantages plus values."""
    values = torch.tensor([[0.1, 0.4, 0.2], [0.3, 0.5, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = torch.tensor([1.0, 0.0])
    normalized, returns = objectives.generalized_advantages(rewards, values, mask)
    raw = []
    for row, length, reward in zip(values.tolist(), (3, 2), (1.0, 0.0)):
        after = [*row[1:length], 0.0]
        surprise = [(reward if t == length - 1 else 0.0) + after[t] - row[t] for t in range(length)]
        raw.append([sum(objectives.GAE_LAMBDA ** (k - t) * surprise[k] for k in range(t, length)) for t in range(length)])
    flat = torch.tensor(raw[0] + raw[1])
    assert (returns - values)[mask].tolist() == pytest.approx(flat.tolist(), abs=1e-6)
    assert normalized[mask].tolist() == pytest.approx(((flat - flat.mean()) / flat.std()).tolist(), abs=1e-4)
    assert normalized[1, 2] == 0


@pytest.mark.parametrize("algorithm", OBJECTIVES)
def test_at_equal_policies_the_gradient_is_the_policy_gradient(algorithm: str) -> None:
    """new = old: the ratio is 1, nothing is clipped, and d loss / d new is minus the advantage over the count of tokens."""
    given = OBJECTIVES[algorithm]
    old = -torch.rand(2, 3)
    new = old.clone().requires_grad_()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([1.0, -2.0])
    shaped = advantages[:, None].expand(2, 3) if given.critic else advantages
    getattr(objectives, algorithm)(new, old, mask, shaped, given).backward()
    counts = torch.tensor([[4.0], [4.0]]) if given.critic else 2 * mask.sum(1, keepdim=True)
    torch.testing.assert_close(new.grad, -advantages[:, None] / counts * mask)


@pytest.mark.parametrize("algorithm", OBJECTIVES)
def test_beyond_the_clip_range_a_good_answer_pulls_no_further(algorithm: str) -> None:
    """Ratio above 1 + high: no gradient with a positive advantage, all of it with a negative one."""
    given = OBJECTIVES[algorithm]
    old, mask = -torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    new = (old + 2 * math.log1p(given.high)).requires_grad_()
    advantages = torch.tensor([1.0, -1.0])
    shaped = advantages[:, None].expand(2, 2) if given.critic else advantages
    getattr(objectives, algorithm)(new, old, mask, shaped, given).backward()
    assert (new.grad[0] == 0).all()
    assert (new.grad[1] > 0).all()


def test_gspo_clips_a_sequence_by_the_mean_of_its_log_ratios() -> None:
    """Two tokens off in opposite directions: no ratio at all for GSPO, two for GRPO."""
    old, mask = -torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    new = old + torch.tensor([[1.0, -1.0]])
    loss = objectives.gspo(new, old, mask, torch.tensor([3.0]), OBJECTIVES["gspo"])
    assert float(loss) == pytest.approx(-3.0)
    assert float(objectives.grpo(new, old, mask, torch.tensor([3.0]), OBJECTIVES["grpo"])) != pytest.approx(-3.0)


def test_the_permutation_test_tells_a_shift_and_not_a_repetition() -> None:
    """Curves of one kind are apart in about one of twenty tests; a shift of five standard deviations is always found."""
    random_ = np.random.default_rng(1)
    false = []
    for _ in range(100):
        runs = random_.normal(size=(10, parity.WINDOWS))
        false.append(parity.p_value(runs[:5], runs[5:]) < parity.LEVEL)
        assert parity.p_value(runs[:5], runs[5:] + 5) == pytest.approx(1 / 126)
        assert parity.p_value(runs[:5], runs[5:8] + 5) == pytest.approx(1 / 56)
    assert sum(false) <= 12
    assert parity.p_value(np.zeros((5, 8)), np.zeros((3, 8))) == 1


def test_the_least_shift_is_found_in_the_metrics_own_unit() -> None:
    """Curves a thousand times as large: a shift a thousand times as large."""
    runs = np.random.default_rng(2).normal(size=(5, parity.WINDOWS))
    small, large = parity.least_shift(runs, [], 3), parity.least_shift(1000 * runs, [], 3)
    assert 0.5 < small < 6
    assert large == pytest.approx(1000 * small)


def test_a_curve_is_cut_into_windows_in_its_order() -> None:
    """24 updates: eight means of three."""
    found = parity.windows([list(range(24))])
    assert found.tolist() == [[1, 4, 7, 10, 13, 16, 19, 22]]


def test_a_schedule_starts_new_weights_at_the_pass_that_yields_the_token() -> None:
    """Prompt of 5: the pass over position 4 yields token 0, so token 2's weights start at position 6."""
    assert smoke.schedule(5, [0, 0, 1, 1, 3]) == ((0, 0), (1, 6), (3, 8))
    assert smoke.schedule(5, [2, 2]) == ((2, 0),)


def test_arms_differ_by_their_variables_and_what_is_there_is_not_made_again(tmp_path) -> None:
    """Every arm is another release or other variables; finished runs are left out, and the ablations have one sampling."""
    assert len({(arm.release, json.dumps(arm.variables, sort_keys=True)) for arm in study.ARMS}) == len(study.ARMS)
    arm = study.ARMS[0]
    assert study.missing(arm, 0, ["gspo", "ppo"], tmp_path) == ["gspo", "ppo"]
    (tmp_path / "gspo").mkdir()
    (tmp_path / "gspo" / f"{arm.name}-0.json").write_text("{}")
    assert study.missing(arm, 0, ["gspo", "ppo"], tmp_path) == ["ppo"]
    assert study.missing(arm, arm.seeds, ["ppo"], tmp_path) == []
    ablation = next(arm for arm in study.ARMS if "-no-" in arm.name)
    assert study.missing(ablation, 0, ["gspo-t1", "ppo"], tmp_path) == ["ppo"]
