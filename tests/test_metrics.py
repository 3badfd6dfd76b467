"""The metrics against float64 loops written out here, their identities, their names and their refusals."""

from __future__ import annotations

import math
import re
import statistics

import numpy as np
import pytest
import torch
from support import ROOT

from vllm_compat.errors import InputError, VllmCompatError
from vllm_compat.metrics import ALIASES, FORMULAS, entropies_of, framework_names, log_kept_mass_of, mismatch


def rollouts(seed: int, gap: float = 0.1, sequences: int = 5) -> tuple[list, list]:
    """Ragged (rollout, trainer) logprobs; one token in eight differs by much more than the others."""
    random = np.random.default_rng(seed)
    rollout, trainer = [], []
    for length in random.integers(1, 30, sequences):
        a = -random.exponential(1.0, length)
        wide = np.where(random.random(length) < 0.125, 10.0, 1.0)
        rollout.append(a.tolist())
        trainer.append(np.minimum(a + random.normal(0, gap, length) * wide, 0.0).tolist())
    return rollout, trainer


def quantile(values: list[float], share: float) -> float:
    ordered, at = sorted(values), share * (len(values) - 1)
    under = math.floor(at)
    return ordered[under] + (ordered[min(under + 1, len(values) - 1)] - ordered[under]) * (at - under)


def by_hand(rollout: list, trainer: list, low: float, high: float, cap: float) -> dict[str, float]:
    """Every metric, token by token, as its formula reads."""
    mean = statistics.fmean
    pairs = [(a, b) for row, other in zip(rollout, trainer) for a, b in zip(row, other)]
    d = [b - a for a, b in pairs]
    r = [math.exp(x) for x in d]
    size = [abs(x) for x in d]
    k3 = [math.exp(x) - 1 - x for x in d]
    js = []
    for a, b in pairs:
        m = math.log((math.exp(a) + math.exp(b)) / 2)
        js.append(0.5 * (math.exp(a - m) - 1 - (a - m)) + 0.5 * (math.exp(b - m) - 1 - (b - m)))
    per = [[y - x for x, y in zip(row, other)] for row, other in zip(rollout, trainer)]
    product = [math.exp(sum(row)) for row in per]
    geometric = [math.exp(mean(row)) for row in per]
    error = [mean([math.exp(abs(x)) for x in row]) for row in per]
    cut = [min(x, cap) for x in r]
    masked = [0.0 if x > cap else x for x in product]
    p, q = [math.exp(a) for a, _ in pairs], [math.exp(b) for _, b in pairs]
    gap = [abs(x - y) for x, y in zip(p, q)]

    def out(values: list[float], under: float, over: float) -> list[float]:
        return [float(x < under or x > over) for x in values]

    def ess(weights: list[float]) -> float:
        return sum(weights) ** 2 / (len(weights) * sum(x * x for x in weights))

    def limited(values: list[float]) -> float:
        return mean([math.exp(2 * max(-20.0, min(20.0, x))) for x in values]) - 1

    return {
        "tokens": len(d),
        "sequences": len(per),
        "outside_rollout": 0,
        "outside_trainer": 0,
        "abs_dlogprob_mean": mean(size),
        "abs_dlogprob_p50": quantile(size, 0.5),
        "abs_dlogprob_p95": quantile(size, 0.95),
        "abs_dlogprob_p99": quantile(size, 0.99),
        "abs_dlogprob_max": max(size),
        "abs_dlogprob_mean_by_sequence": mean([mean([abs(x) for x in row]) for row in per]),
        "kl_rollout_trainer_k1": mean([a - b for a, b in pairs]),
        "kl_rollout_trainer_k2": mean([(a - b) ** 2 / 2 for a, b in pairs]),
        "kl_rollout_trainer_k3": mean(k3),
        "kl_rollout_trainer_k3_max": max(k3),
        "kl_rollout_trainer_k1_by_sequence": mean([mean([-x for x in row]) for row in per]),
        "kl_rollout_trainer_k3_by_sequence": mean([mean([math.exp(x) - 1 - x for x in row]) for row in per]),
        "kl_trainer_rollout_k1": mean(d),
        "kl_trainer_rollout_k2": mean([x * x / 2 for x in d]),
        "kl_trainer_rollout_k3": mean([math.exp(-x) - 1 + x for x in d]),
        "js_k3": mean(js),
        "mult_error_token": mean([math.exp(x) for x in size]),
        "mult_error_sequence_mean": mean(error),
        "mult_error_sequence_min": min(error),
        "mult_error_sequence_max": max(error),
        "ratio_mean": mean(r),
        "ratio_min": min(r),
        "ratio_max": max(r),
        "ratio_mean_by_sequence": mean([mean([math.exp(x) for x in row]) for row in per]),
        "ratio_sum": sum(r),
        "ratio_squared_sum": sum(x * x for x in r),
        "ratio_outside_0.9_1.1": mean(out(r, 0.9, 1.1)),
        "ratio_outside_0.8_1.2": mean(out(r, 0.8, 1.2)),
        "ratio_geometric_mean": mean(geometric),
        "ratio_product_mean": mean(product),
        "ratio_truncated_mean": mean(cut),
        "ratio_truncated_std": statistics.pstdev(cut),
        "ratio_truncated_min": min(cut),
        "ratio_truncated_max": max(cut),
        "ratio_above_cap": mean([float(x > cap) for x in r]),
        "ratio_below_inverse_cap": mean([float(x < 1 / cap) for x in r]),
        "ratio_product_masked_mean": mean(masked),
        "ratio_product_masked_min": min(masked),
        "ratio_product_masked_max": max(masked),
        "clip_rate": mean(out(r, 1 - low, 1 + high)),
        "clip_rate_by_sequence": mean([mean(out([math.exp(x) for x in row], 1 - low, 1 + high)) for row in per]),
        "clip_rate_sequence": mean(out(geometric, 1 - low, 1 + high)),
        "ess": ess(r),
        "ess_truncated": ess(cut),
        "ess_sequence": ess(product),
        "chi2_token": limited(d),
        "chi2_sequence_product": limited([sum(row) for row in per]),
        "chi2_sequence_geometric": limited([mean(row) for row in per]),
        "pearson_probs": statistics.correlation(p, q),
        "abs_dprob_mean": mean(gap),
        "abs_dprob_std": statistics.stdev(gap),
        "abs_dprob_max": max(gap),
        "logprob_rollout_by_sequence": mean([mean(row) for row in rollout]),
        "logprob_trainer_by_sequence": mean([mean(row) for row in trainer]),
        "log_ppl_rollout": -mean([mean(row) for row in rollout]),
        "log_ppl_trainer": -mean([mean(row) for row in trainer]),
        "ppl_rollout": mean([math.exp(-mean(row)) for row in rollout]),
        "ppl_trainer": mean([math.exp(-mean(row)) for row in trainer]),
        "ppl_ratio": mean([math.exp(-mean(row)) for row in per]),
        "log_ppl_abs_diff": mean([abs(mean(row)) for row in per]),
        "log_ppl_diff_min": min(-mean(row) for row in per),
        "log_ppl_diff_max": max(-mean(row) for row in per),
        "entropy_sampled": mean([-a for a, _ in pairs]),
        "entropy_importance_weighted": mean([-math.exp(b - a) * b for a, b in pairs]),
    }


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("gap", [1e-6, 0.01, 0.3, 2.0])
def test_every_metric_against_loops(seed, gap):
    """All metrics equal their formulas in plain float64, for tiny, usual and wild gaps."""
    rollout, trainer = rollouts(seed, gap)
    expected = by_hand(rollout, trainer, 0.1, 0.3, 1.7)
    found = mismatch(rollout, trainer, clip=(0.1, 0.3), cap=1.7)
    assert list(found) == [name for name in FORMULAS if name in expected]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_optional_metrics_against_loops(seed):
    """Entropies and kept mass enter as given, over the same tokens."""
    rollout, trainer = rollouts(seed)
    random = np.random.default_rng(seed)
    entropies = [random.random(len(row)).tolist() for row in rollout]
    mass = [(-random.random(len(row))).tolist() for row in rollout]
    found = mismatch(rollout, trainer, entropies=entropies, log_kept_mass=mass)
    assert set(found) == set(FORMULAS)
    d = [y - x for row, other in zip(rollout, trainer) for x, y in zip(row, other)]
    h, m = [x for row in entropies for x in row], [x for row in mass for x in row]
    assert found["entropy"] == pytest.approx(statistics.fmean(h))
    assert found["entropy_by_sequence"] == pytest.approx(statistics.fmean(statistics.fmean(row) for row in entropies))
    assert found["kl_entropy_ratio"] == pytest.approx(found["kl_rollout_trainer_k3"] / found["entropy"])
    assert found["kept_mass_mean"] == pytest.approx(statistics.fmean(math.exp(x) for x in m))
    assert found["kept_mass_min"] == pytest.approx(math.exp(min(m)))
    assert found["kept_mass_bias"] == pytest.approx(statistics.fmean(m))
    assert found["ratio_renormalized_mean"] == pytest.approx(statistics.fmean(math.exp(x - y) for x, y in zip(d, m)))


def test_identical_inputs():
    """Against itself everything is 0 or 1."""
    rollout, _ = rollouts(3)
    found = mismatch(rollout, rollout)
    zero = [
        n for n in found if n.startswith(("abs_", "kl_", "js", "chi2", "clip", "ratio_outside", "log_ppl_diff", "log_ppl_abs"))
    ]
    assert zero
    assert all(found[name] == pytest.approx(0, abs=1e-15) for name in zero)
    one = [n for n in found if n.startswith(("ess", "mult_", "ratio_m", "ratio_g", "ratio_p", "pearson", "ppl_ratio"))]
    assert one
    assert all(found[name] == pytest.approx(1) for name in one)


@pytest.mark.parametrize("seed", range(10))
def test_directions(seed):
    """Swapping the sides swaps the directions: k1 changes sign, k2 does not, k3 trades places and is never negative."""
    rollout, trainer = rollouts(seed, 0.5)
    here, there = mismatch(rollout, trainer), mismatch(trainer, rollout)
    assert here["kl_rollout_trainer_k1"] == -here["kl_trainer_rollout_k1"]
    assert here["kl_rollout_trainer_k2"] == here["kl_trainer_rollout_k2"]
    for k in ("k1", "k2", "k3"):
        assert here[f"kl_rollout_trainer_{k}"] == pytest.approx(there[f"kl_trainer_rollout_{k}"])
    assert min(here["kl_rollout_trainer_k3"], here["kl_trainer_rollout_k3"]) > 0
    for same in ("js_k3", "mult_error_token", "abs_dlogprob_p99", "pearson_probs", "abs_dprob_max"):
        assert here[same] == pytest.approx(there[same])


def test_k1_and_k3_estimate_the_real_divergence():
    """Weighted by the rollout's own distribution, k1 and k3 are KL(rollout ‖ trainer) and the mean ratio is 1."""
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(8)), random.dirichlet(np.ones(8))
    counts = np.round(p * 1e5).astype(int)
    p = counts / counts.sum()
    tokens = np.repeat(np.arange(8), counts)
    found = mismatch(np.log(p)[tokens], np.log(q)[tokens])
    real = float((p * np.log(p / q)).sum())
    assert found["kl_rollout_trainer_k1"] == pytest.approx(real)
    assert found["kl_rollout_trainer_k3"] == pytest.approx(real)
    assert found["ratio_mean"] == pytest.approx(1)
    assert found["chi2_token"] == pytest.approx(float((q**2 / p).sum()) - 1)
    assert found["entropy_sampled"] == pytest.approx(float(-(p * np.log(p)).sum()))
    assert found["entropy_importance_weighted"] == pytest.approx(float(-(q * np.log(q)).sum()))


@pytest.mark.parametrize("seed", range(5))
def test_ragged_and_masked_are_the_same(seed):
    """A padded batch with a mask, in any container and with rubbish in the padding, equals the ragged lists."""
    rollout, trainer = rollouts(seed)
    width = max(map(len, rollout)) + 2
    mask = np.array([[i < len(row) for i in range(width)] for row in rollout])
    a, b = np.full(mask.shape, np.nan), np.full(mask.shape, np.inf)
    for index, (row, other) in enumerate(zip(rollout, trainer)):
        a[index, : len(row)], b[index, : len(row)] = row, other
    expected = mismatch(rollout, trainer, floor=rollout)
    arrays = mismatch(a, b, mask=mask, floor=a)
    tensors = mismatch(torch.tensor(a, requires_grad=True), torch.tensor(b), mask=torch.tensor(mask).int(), floor=torch.tensor(a))
    lists = mismatch(a.tolist(), b.tolist(), mask=mask.astype(int).tolist(), floor=a.tolist())
    mixed = mismatch(
        [torch.tensor(row, dtype=torch.float64) for row in rollout],
        [np.array(row) for row in trainer],
        floor=[*map(tuple, rollout)],
    )
    assert expected == arrays == tensors == lists == mixed
    assert mismatch(rollout[0], trainer[0]) == mismatch([rollout[0]], [trainer[0]])


def test_bfloat16_is_read_exactly():
    """A bfloat16 tensor is its own values in float64."""
    a, b = (-torch.rand(2, 3, 4)).bfloat16()
    assert mismatch(a, b) == mismatch(a.double().tolist(), b.double().tolist())


def test_tokens_outside_a_kept_set_are_counted():
    """-inf on a side is counted there and is in no other number; a sequence left empty is no sequence."""
    inf = math.inf
    rollout = [[-1.0, -inf, -2.0], [-inf], [-0.5, -1.5]]
    trainer = [[-1.1, -1.0, -inf], [-inf], [-0.4, -1.5]]
    found = mismatch(rollout, trainer)
    assert (found["outside_rollout"], found["outside_trainer"], found["tokens"], found["sequences"]) == (2, 2, 3, 2)
    rest = mismatch([[-1.0], [-0.5, -1.5]], [[-1.1], [-0.4, -1.5]])
    assert {**rest, "outside_rollout": 2, "outside_trainer": 2} == found


def test_floor_is_the_trainer_against_itself():
    """floor/… is what mismatch finds between the trainer's two scorings."""
    rollout, trainer = rollouts(1)
    _, again = rollouts(1, 0.05)
    found = mismatch(rollout, trainer, floor=again, clip=0.1)
    alone = mismatch(again, trainer, clip=0.1)
    assert {name.removeprefix("floor/"): value for name, value in found.items() if name.startswith("floor/")} == alone
    assert found["kl_rollout_trainer_k3"] == mismatch(rollout, trainer)["kl_rollout_trainer_k3"]


def test_extreme_ratios():
    """Ratios beyond float64 are inf, never a warning or an exception; chi2 stays finite."""
    found = mismatch([[-2000.0, -1.0]], [[-1.0, -2000.0]])
    assert found["ratio_mean"] == found["kl_rollout_trainer_k3"] == found["mult_error_token"] == math.inf
    assert found["chi2_token"] == pytest.approx((math.exp(40) + math.exp(-40)) / 2 - 1)
    assert found["ess"] == pytest.approx(0.5)
    assert (found["ratio_truncated_max"], found["abs_dlogprob_max"]) == (2.0, 1999.0)
    tiny = mismatch([-1.0], [-1.0 - 1e-12])
    assert 0 <= tiny["kl_rollout_trainer_k3"] < 1e-23
    assert math.isnan(tiny["abs_dprob_std"])
    assert math.isnan(tiny["pearson_probs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([-1.0], [-1.0, -2.0]), r"trainer has sequences of \[2\]"),
        (([[-1.0], [-1.0]], [[-1.0]]), "2 sequences"),
        (([-1.0, math.nan], [-1.0, -1.0]), "rollout: 1 of 2 values are nan"),
        (([-1.0], [math.inf]), "trainer: 1 of 1"),
        (([-1.0], [0.7]), "above 0, so these are not logprobs"),
        (([], []), "no token to compare"),
        (([-math.inf], [-1.0]), "none of them is finite"),
        ((np.zeros((2, 2, 2)), np.zeros((2, 2, 2))), r"want \[tokens\]"),
        ((["a"], ["b"]), "not numbers"),
    ],
)
def test_refusals(arguments, message):
    """What cannot be compared raises one error that says which side and why."""
    with pytest.raises(InputError, match=message) as raised:
        mismatch(*arguments)
    assert isinstance(raised.value, VllmCompatError)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mask": [0, 0]}, "no token to compare: 0 are left by the mask"),
        ({"mask": [0, 2]}, "mask: holds values other than 0 and 1"),
        ({"mask": [1]}, r"rollout has sequences of \[2\]"),
        ({"floor": [-1.0]}, "floor has sequences"),
        ({"floor": [-1.0, math.nan]}, "floor: 1 of 2"),
        ({"entropies": [1.0]}, "entropies has sequences"),
        ({"entropies": [1.0, -math.inf]}, "entropies: 1 of 2"),
        ({"log_kept_mass": [0.5, 0.9]}, "log_kept_mass: 0.9 is above 0"),
        ({"clip": 1.5}, "clip 1.5"),
        ({"cap": 0}, "cap 0"),
    ],
)
def test_refusals_of_options(more, message):
    """So do options that do not fit."""
    with pytest.raises(InputError, match=message):
        mismatch([-1.0, -2.0], [-1.0, -2.0], **more)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    return float((values * mask).sum() / mask.sum())


@pytest.mark.parametrize("seed", range(5))
def test_framework_names(seed):
    """Each framework's metrics, computed on a padded batch the way it does, appear under its names."""
    rollout, trainer = rollouts(seed, 0.2)
    width = max(map(len, rollout))
    mask = torch.tensor([[float(i < len(row)) for i in range(width)] for row in rollout], dtype=torch.float64)
    old = torch.tensor([row + [0.0] * (width - len(row)) for row in rollout], dtype=torch.float64)
    new = torch.tensor([row + [0.0] * (width - len(row)) for row in trainer], dtype=torch.float64)
    entropies = torch.rand(mask.shape, dtype=torch.float64) * mask
    found = mismatch(old, new, mask=mask, entropies=entropies, cap=2.0)
    log_ratio, count = new - old, mask.sum(1)
    ratio, k3 = log_ratio.exp(), log_ratio.exp() - log_ratio - 1

    def sequences(values: torch.Tensor) -> float:
        return float(((values * mask).sum(1) / count).mean())

    def clipped(values: torch.Tensor) -> torch.Tensor:
        return (values.clamp(0.8, 1.2) != values).double()

    total, geometric = (log_ratio * mask).sum(1).exp(), ((log_ratio * mask).sum(1) / count).exp()
    kept = total.masked_fill(total > 2.0, 0.0)
    cut, valid = ratio.clamp(max=2.0), mask.bool()
    normalized = cut / masked_mean(cut, mask)
    log_ppl = -((new * mask).sum(1) / count)
    gap = (old.exp() - new.exp()).abs()[valid]
    error = (log_ratio.abs() * mask).exp()
    per_sequence = (error * mask).sum(1) / count
    mixture = (0.5 * new.exp() + 0.5 * old.exp()).log()
    js = sum((x - mixture).exp() - (x - mixture) - 1 for x in (new, old)) / 2
    pipelinerl = {
        "rl/kl_new_old": sequences(k3),
        "rl/mean_abs_log_ratio_new_old": sequences(log_ratio.abs()),
        "rl/ratio_new_old": sequences(ratio),
        "rl/ratio_new_old_sum": float((ratio * mask).sum()),
        "rl/ratio_new_old_squared_sum": float((ratio * ratio * mask).sum()),
        "rl/ess": float((ratio * mask).sum() ** 2 / (ratio**2 * mask).sum() / mask.sum()),
        "rl/old_logprobs": sequences(old),
        "rl/new_logprobs": sequences(new),
        "rl/entropy": sequences(entropies),
        "rl/num_output_tokens_sum": float(mask.sum()),
    }
    difference = {
        "sampling/sampling_logp_difference/mean": float(log_ratio.abs()[valid].mean()),
        "sampling/sampling_logp_difference/max": float(log_ratio.abs()[valid].max()),
    }
    importance = "sampling/importance_sampling_ratio"
    expected = {
        "pipelinerl": {**pipelinerl, "rl/clamp_log_ratio_new_old_indicator": sequences(clipped(ratio))},
        "pipelinerl:gspo": {
            **pipelinerl,
            "rl/clamp_log_ratio_new_old_indicator": sequences(clipped(geometric)[:, None].expand_as(mask)),
        },
        "verl": {
            "rollout_corr/kl": masked_mean(old - new, mask),
            "rollout_corr/k3_kl": masked_mean(k3, mask),
            "rollout_corr/training_ppl": float(log_ppl.exp().mean()),
            "rollout_corr/training_log_ppl": float(log_ppl.mean()),
            "rollout_corr/rollout_ppl": float((-(old * mask).sum(1) / count).exp().mean()),
            "rollout_corr/rollout_log_ppl": float((-(old * mask).sum(1) / count).mean()),
            "rollout_corr/log_ppl_diff": float((-geometric.log()).mean()),
            "rollout_corr/log_ppl_abs_diff": float(geometric.log().abs().mean()),
            "rollout_corr/log_ppl_diff_max": float((-geometric.log()).max()),
            "rollout_corr/log_ppl_diff_min": float((-geometric.log()).min()),
            "rollout_corr/ppl_ratio": float((1 / geometric).mean()),
            "rollout_corr/chi2_token": masked_mean(ratio**2, mask) - 1,
            "rollout_corr/chi2_seq": float((total**2).mean()) - 1,
            "rollout_corr/rollout_is_mean": masked_mean(cut, mask),
            "rollout_corr/rollout_is_std": (masked_mean(cut**2, mask) - masked_mean(cut, mask) ** 2) ** 0.5,
            "rollout_corr/rollout_is_min": float(cut[valid].min()),
            "rollout_corr/rollout_is_max": float(cut[valid].max()),
            "rollout_corr/rollout_is_eff_sample_size": 1 / masked_mean(normalized**2, mask),
            "rollout_corr/rollout_is_ratio_fraction_high": masked_mean((ratio > 2).double(), mask),
            "rollout_corr/rollout_is_ratio_fraction_low": masked_mean((ratio < 0.5).double(), mask),
            "training/rollout_probs_diff_mean": float(gap.mean()),
            "training/rollout_probs_diff_std": float(gap.std()),
            "training/rollout_probs_diff_max": float(gap.max()),
            "training/rollout_actor_probs_pearson_corr": float(
                torch.corrcoef(torch.stack([old.exp()[valid], new.exp()[valid]]))[0, 1]
            ),
        },
        "trl": {
            **difference,
            f"{importance}/min": float(kept.min()),
            f"{importance}/mean": float(kept.mean()),
            f"{importance}/max": float(kept.max()),
        },
        "trl:token_truncate": {
            **difference,
            f"{importance}/min": float(cut[valid].min()),
            f"{importance}/mean": float(cut[valid].mean()),
            f"{importance}/max": float(cut[valid].max()),
        },
        "nemo-rl": {
            "train/token_mult_prob_error": masked_mean(error, mask),
            "train/mean_seq_mult_prob_error": float(per_sequence.mean()),
            "train/min_seq_mult_prob_error": float(per_sequence.min()),
            "train/max_seq_mult_prob_error": float(per_sequence.max()),
            "train/gen_kl_error": masked_mean(k3, mask),
            "train/policy_kl_error": masked_mean((-log_ratio).exp() - 1 + log_ratio, mask),
            "train/js_divergence_error": masked_mean(js, mask),
            "train/sampling_importance_ratio": masked_mean(ratio, mask),
            "train/approx_entropy": -masked_mean(ratio * new, mask),
        },
        "prime-rl": {
            "mismatch_kl/all/mean": float(k3[valid].mean()),
            "mismatch_kl/all/max": float(k3[valid].max()),
            "mismatch_kl/mean": sequences(k3),
            "entropy/all/mean": float(entropies[valid].mean()),
            "entropy/mean": float(entropies[valid].mean()),
            "kl_ent_ratio/mean": float(k3[valid].mean() / entropies[valid].mean()),
        },
    }
    assert set(expected) == set(ALIASES)
    for framework, theirs in expected.items():
        assert framework_names(framework, found) == pytest.approx(theirs, rel=1e-9, abs=1e-14), framework


def test_framework_names_have_the_floor_and_refuse_strangers():
    """The floor appears under the same names; what was not computed is left out; another framework is refused."""
    rollout, trainer = rollouts(2)
    found = mismatch(rollout, trainer, floor=rollout)
    named = framework_names("prime-rl", found)
    assert "entropy/all/mean" not in named
    assert named["floor/mismatch_kl/all/mean"] == found["floor/kl_rollout_trainer_k3"]
    with pytest.raises(InputError, match="no framework 'other': there are pipelinerl"):
        framework_names("other", found)


def test_entropy_and_kept_mass_of_distributions():
    """Both helpers equal loops over the distributions, with removed tokens, for tensors and arrays."""
    random = np.random.default_rng(5)
    full = np.log(random.dirichlet(np.ones(12), 6))
    processed = np.where(full < np.sort(full, axis=1)[:, 4:5], -np.inf, full)
    processed = processed - np.log(np.exp(processed).sum(1, keepdims=True))
    for row in range(6):
        p = np.exp(processed[row])
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        mass = math.log(sum(math.exp(x) for x, y in zip(full[row], processed[row]) if y > -math.inf))
        assert entropies_of(torch.tensor(processed))[row] == pytest.approx(entropy)
        assert log_kept_mass_of(full, torch.tensor(processed))[row] == pytest.approx(mass)
        assert float((full - processed)[row][np.isfinite(processed[row])].max()) == pytest.approx(mass)
    with pytest.raises(InputError, match="same tokens"):
        log_kept_mass_of(full, processed[:2])


def test_kept_mass_explains_the_mean_ratio():
    """Sampling from a truncated distribution, a full-vocabulary trainer's mean ratio is the kept mass; renormalized, 1."""
    full = np.log(np.array([0.5, 0.2, 0.2, 0.05, 0.05]))
    processed = np.where(full < math.log(0.1), -np.inf, full - math.log(0.9))
    tokens = np.repeat([0, 1, 2], [500, 200, 200])
    mass = np.full(len(tokens), log_kept_mass_of(full, processed))
    found = mismatch(processed[tokens], full[tokens], log_kept_mass=mass)
    assert [found["ratio_mean"], found["kept_mass_mean"]] == pytest.approx([0.9, 0.9])
    assert [-found["kl_rollout_trainer_k1"], found["kept_mass_bias"]] == pytest.approx([math.log(0.9)] * 2)
    assert found["ratio_renormalized_mean"] == pytest.approx(1)


def test_documented_metrics_are_the_code():
    """docs/metrics.md has a row for each metric, with the code's own formula, and every framework's names."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*?) \| ", text, re.MULTILINE))
    for name, formula in FORMULAS.items():
        assert rows.get(name, "").replace("\\|", "|") == formula, name
    for framework, names in ALIASES.items():
        assert f"`{framework}`" in text
        assert all(f"`{theirs}`" in text for theirs in names), framework
