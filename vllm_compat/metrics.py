"""
How far the trainer is from the rollout: one set of metrics, each with its formula, under every framework's names.

    found = mismatch(rollout, trainer, mask=mask, floor=trainer_at_another_batch_size)
    found["kl_rollout_trainer_k3"], found["floor/kl_rollout_trainer_k3"]
    framework_names("verl", found)  # {"rollout_corr/k3_kl": …, …}

Throughout: d = trainer logprob - rollout logprob of the sampled token, in nats, and r = exp(d), the importance ratio.
The rollout is the behavior policy: the tokens were drawn from it. ``FORMULAS`` has every metric; docs/metrics.md says how
to read them. A number means little alone: the trainer scored twice, at two batch sizes, also differs from itself. Give
that second scoring as ``floor``.

Sources. k1, k2, k3: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html. Sequence
ratio as a geometric mean and its clipping: GSPO, arXiv 2507.18071. Correlation of probabilities: MiniMax-M1, arXiv
2506.13585. Where a formula is a framework's own, ``ALIASES`` names the file it was read in.

Everything is computed in float64 with numpy, which comes with vLLM and torch. A ratio too large for float64 (d above 709)
is inf, and what is computed from it inf or nan; only the chi2 metrics limit the log ratio first, to 20, as verl does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_compat.errors import InputError

# How much above 0 a logprob may be by rounding. Probabilities given by mistake are far above it.
_ROUNDING = 1e-3
# verl limits log ratios to this before it squares them: verl/trainer/ppo/rollout_corr_helper.py, SAFETY_BOUND.
_CHI2_LIMIT = 20.0

FORMULAS: dict[str, str] = {
    "tokens": "number of tokens compared: kept by the mask, finite on both sides",
    "sequences": "number of sequences with such a token",
    "outside_rollout": "number of tokens whose rollout logprob is -inf; in no other metric",
    "outside_trainer": "number of tokens whose trainer logprob is -inf; in no other metric",
    "abs_dlogprob_mean": "mean |d|",
    "abs_dlogprob_p50": "median of |d|",
    "abs_dlogprob_p95": "95th percentile of |d|",
    "abs_dlogprob_p99": "99th percentile of |d|",
    "abs_dlogprob_max": "max |d|",
    "abs_dlogprob_mean_by_sequence": "mean over sequences of a sequence's mean |d|",
    "kl_rollout_trainer_k1": "mean -d: k1 of KL(rollout ‖ trainer), unbiased",
    "kl_rollout_trainer_k2": "mean d²/2: k2 of KL(rollout ‖ trainer)",
    "kl_rollout_trainer_k3": "mean r - 1 - d: k3 of KL(rollout ‖ trainer), unbiased, each term ≥ 0",
    "kl_rollout_trainer_k3_max": "max r - 1 - d",
    "kl_rollout_trainer_k1_by_sequence": "mean over sequences of a sequence's mean -d",
    "kl_rollout_trainer_k3_by_sequence": "mean over sequences of a sequence's mean r - 1 - d",
    "kl_trainer_rollout_k1": "mean d: the two sides swapped; the tokens are still the rollout's, so no estimate of KL",
    "kl_trainer_rollout_k2": "mean d²/2: the same number in both directions",
    "kl_trainer_rollout_k3": "mean 1/r - 1 + d: the two sides swapped; the tokens are still the rollout's, so no estimate of KL",
    "js_k3": "mean of k3 from each side to their mixture, halved: m = log((e^a + e^b)/2), mean ½(e^(a-m) - 1 - (a-m)) + ½(…b…)",
    "mult_error_token": "mean exp |d|",
    "mult_error_sequence_mean": "mean over sequences of a sequence's mean exp |d|",
    "mult_error_sequence_min": "least such sequence",
    "mult_error_sequence_max": "greatest such sequence",
    "ratio_mean": "mean r",
    "ratio_min": "min r",
    "ratio_max": "max r",
    "ratio_mean_by_sequence": "mean over sequences of a sequence's mean r",
    "ratio_sum": "sum of r",
    "ratio_squared_sum": "sum of r²",
    "ratio_outside_0.9_1.1": "share of tokens with r < 0.9 or r > 1.1",
    "ratio_outside_0.8_1.2": "share of tokens with r < 0.8 or r > 1.2",
    "ratio_geometric_mean": "mean over sequences of s = exp(mean d), GSPO's sequence ratio",
    "ratio_product_mean": "mean over sequences of exp(sum d)",
    "ratio_truncated_mean": "mean min(r, cap): truncated importance sampling",
    "ratio_truncated_std": "standard deviation of min(r, cap), population",
    "ratio_truncated_min": "min of min(r, cap)",
    "ratio_truncated_max": "max of min(r, cap)",
    "ratio_above_cap": "share of tokens with r > cap",
    "ratio_below_inverse_cap": "share of tokens with r < 1/cap",
    "ratio_product_masked_mean": "mean over sequences of exp(sum d), counted as 0 where above cap",
    "ratio_product_masked_min": "least such sequence",
    "ratio_product_masked_max": "greatest such sequence",
    "clip_rate": "share of tokens with r < 1 - low or r > 1 + high; PPO's loss is flat there only for one sign of the advantage",
    "clip_rate_by_sequence": "mean over sequences of a sequence's share of such tokens",
    "clip_rate_sequence": "share of sequences with s < 1 - low or s > 1 + high, s = exp(mean d)",
    "ess": "(sum r)² / (N · sum r²): effective sample size as a share of the tokens",
    "ess_truncated": "the same of min(r, cap)",
    "ess_sequence": "the same of exp(sum d), as a share of the sequences",
    "chi2_token": "mean r² - 1, log ratio limited to ±20",
    "chi2_sequence_product": "mean over sequences of exp(2 sum d) - 1, log ratio limited to ±20",
    "chi2_sequence_geometric": "mean over sequences of exp(2 mean d) - 1, log ratio limited to ±20",
    "pearson_probs": "Pearson correlation of the two probabilities; nan where a side is constant",
    "abs_dprob_mean": "mean |e^a - e^b|, of probabilities",
    "abs_dprob_std": "its standard deviation, sample (N - 1); nan for one token",
    "abs_dprob_max": "max |e^a - e^b|",
    "logprob_rollout_by_sequence": "mean over sequences of a sequence's mean rollout logprob",
    "logprob_trainer_by_sequence": "mean over sequences of a sequence's mean trainer logprob",
    "log_ppl_rollout": "minus logprob_rollout_by_sequence",
    "log_ppl_trainer": "minus logprob_trainer_by_sequence",
    "ppl_rollout": "mean over sequences of exp(-mean rollout logprob)",
    "ppl_trainer": "mean over sequences of exp(-mean trainer logprob)",
    "ppl_ratio": "mean over sequences of exp(-mean d)",
    "log_ppl_abs_diff": "mean over sequences of |mean d|",
    "log_ppl_diff_min": "min over sequences of mean -d",
    "log_ppl_diff_max": "max over sequences of mean -d",
    "entropy_sampled": "mean minus rollout logprob: the rollout's entropy, estimated from its own tokens",
    "entropy_importance_weighted": "mean -r · trainer logprob: the trainer's entropy, estimated from the rollout's tokens",
    "entropy": "mean of the given entropies",
    "entropy_by_sequence": "mean over sequences of a sequence's mean of the given entropies",
    "kl_entropy_ratio": "kl_rollout_trainer_k3 / entropy",
    "kept_mass_mean": "mean m, m the probability the sampler's filters kept",
    "kept_mass_min": "min m",
    "kept_mass_bias": "mean log m: the shift of d where the rollout is renormalized over what it kept and the trainer is not",
    "ratio_renormalized_mean": "mean r / m: the ratio without that shift",
}

# Framework -> its name -> ours. Only where the formula is the same, with the framework's defaults. A second table of a
# framework, "name:variant", is for another setting of it.
#
# pipelinerl  pipelinerl/finetune/rl/__init__.py and rl/utils.py (new = trainer's current weights, old = rollout; means are
#             per sequence, then over sequences) and run_finetune.py (ess); :gspo is policy_loss=gspo
# verl        verl/trainer/ppo/rollout_corr_helper.py (old_log_prob = trainer; rollout_is=token, its threshold is our cap)
#             and verl/utils/debug/metrics.py
# trl         trl/trainer/grpo_trainer.py (old_per_token_logps = trainer; vllm_importance_sampling_mode=sequence_mask, its
#             cap, 3.0 by default, is ours); :token_truncate is that mode
# nemo-rl     nemo_rl/algorithms/loss/loss_functions.py and grpo.py (prev_logprobs = trainer, generation_logprobs = rollout;
#             kl type k3, token-level ratios, no truncation)
# prime-rl    src/prime_rl/trainer/rl/train.py and loss.py; the names without "all" are of older versions, which averaged per
#             sequence first
_PIPELINERL = {
    "rl/kl_new_old": "kl_rollout_trainer_k3_by_sequence",
    "rl/mean_abs_log_ratio_new_old": "abs_dlogprob_mean_by_sequence",
    "rl/ratio_new_old": "ratio_mean_by_sequence",
    "rl/ratio_new_old_sum": "ratio_sum",
    "rl/ratio_new_old_squared_sum": "ratio_squared_sum",
    "rl/ess": "ess",
    "rl/old_logprobs": "logprob_rollout_by_sequence",
    "rl/new_logprobs": "logprob_trainer_by_sequence",
    "rl/entropy": "entropy_by_sequence",
    "rl/num_output_tokens_sum": "tokens",
}
_TRL = {
    "sampling/sampling_logp_difference/mean": "abs_dlogprob_mean",
    "sampling/sampling_logp_difference/max": "abs_dlogprob_max",
}
ALIASES: dict[str, dict[str, str]] = {
    "pipelinerl": {**_PIPELINERL, "rl/clamp_log_ratio_new_old_indicator": "clip_rate_by_sequence"},
    "pipelinerl:gspo": {**_PIPELINERL, "rl/clamp_log_ratio_new_old_indicator": "clip_rate_sequence"},
    "verl": {
        "rollout_corr/kl": "kl_rollout_trainer_k1",
        "rollout_corr/k3_kl": "kl_rollout_trainer_k3",
        "rollout_corr/training_ppl": "ppl_trainer",
        "rollout_corr/training_log_ppl": "log_ppl_trainer",
        "rollout_corr/rollout_ppl": "ppl_rollout",
        "rollout_corr/rollout_log_ppl": "log_ppl_rollout",
        "rollout_corr/log_ppl_diff": "kl_rollout_trainer_k1_by_sequence",
        "rollout_corr/log_ppl_abs_diff": "log_ppl_abs_diff",
        "rollout_corr/log_ppl_diff_max": "log_ppl_diff_max",
        "rollout_corr/log_ppl_diff_min": "log_ppl_diff_min",
        "rollout_corr/ppl_ratio": "ppl_ratio",
        "rollout_corr/chi2_token": "chi2_token",
        "rollout_corr/chi2_seq": "chi2_sequence_product",
        "rollout_corr/rollout_is_mean": "ratio_truncated_mean",
        "rollout_corr/rollout_is_std": "ratio_truncated_std",
        "rollout_corr/rollout_is_min": "ratio_truncated_min",
        "rollout_corr/rollout_is_max": "ratio_truncated_max",
        "rollout_corr/rollout_is_eff_sample_size": "ess_truncated",
        "rollout_corr/rollout_is_ratio_fraction_high": "ratio_above_cap",
        "rollout_corr/rollout_is_ratio_fraction_low": "ratio_below_inverse_cap",
        "training/rollout_probs_diff_mean": "abs_dprob_mean",
        "training/rollout_probs_diff_std": "abs_dprob_std",
        "training/rollout_probs_diff_max": "abs_dprob_max",
        "training/rollout_actor_probs_pearson_corr": "pearson_probs",
    },
    "trl": {
        **_TRL,
        "sampling/importance_sampling_ratio/min": "ratio_product_masked_min",
        "sampling/importance_sampling_ratio/mean": "ratio_product_masked_mean",
        "sampling/importance_sampling_ratio/max": "ratio_product_masked_max",
    },
    "trl:token_truncate": {
        **_TRL,
        "sampling/importance_sampling_ratio/min": "ratio_truncated_min",
        "sampling/importance_sampling_ratio/mean": "ratio_truncated_mean",
        "sampling/importance_sampling_ratio/max": "ratio_truncated_max",
    },
    "nemo-rl": {
        "train/token_mult_prob_error": "mult_error_token",
        "train/mean_seq_mult_prob_error": "mult_error_sequence_mean",
        "train/min_seq_mult_prob_error": "mult_error_sequence_min",
        "train/max_seq_mult_prob_error": "mult_error_sequence_max",
        "train/gen_kl_error": "kl_rollout_trainer_k3",
        "train/policy_kl_error": "kl_trainer_rollout_k3",
        "train/js_divergence_error": "js_k3",
        "train/sampling_importance_ratio": "ratio_mean",
        "train/approx_entropy": "entropy_importance_weighted",
    },
    "prime-rl": {
        "mismatch_kl/all/mean": "kl_rollout_trainer_k3",
        "mismatch_kl/all/max": "kl_rollout_trainer_k3_max",
        "mismatch_kl/mean": "kl_rollout_trainer_k3_by_sequence",
        "entropy/all/mean": "entropy",
        "entropy/mean": "entropy",
        "kl_ent_ratio/mean": "kl_entropy_ratio",
    },
}


def mismatch(
    rollout: Any,
    trainer: Any,
    *,
    mask: Any = None,
    floor: Any = None,
    clip: float | tuple[float, float] = 0.2,
    cap: float = 2.0,
    entropies: Any = None,
    log_kept_mass: Any = None,
) -> dict[str, float]:
    """Every metric of ``FORMULAS`` that the given values allow, by name.

    rollout, trainer: logprobs in nats of the sampled tokens, as the engine returned them and as the trainer scored them.
        A tensor, array or nested list: [tokens] for one sequence, [batch, steps] with a mask, or a list of sequences of
        any lengths. Any float dtype and device; the trainer's gradient is not followed.
    mask: the same shape; True or 1 where a token counts. Other places may hold anything, nan too.
    floor: the trainer's logprobs again, scored at another batch size. The metrics of that pair, the repetition in the
        rollout's place, are added as ``floor/<name>``.
    clip: epsilon of the clip rates, or (low, high).
    cap: limit of the truncated and masked ratios: verl's rollout_is_threshold, TRL's vllm_importance_sampling_cap.
    entropies: the trainer's entropy at each token, in nats, the same shape (see `entropies_of`).
    log_kept_mass: log of the probability that the filters kept at each token, the same shape (see `log_kept_mass_of`).

    A logprob of -inf is a token outside what that side keeps. Such tokens are counted (``outside_rollout``,
    ``outside_trainer``) and left out of everything else. Raises InputError for shapes that differ, nan, +inf, a logprob
    above 0, or where no token is left to compare.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    if not (0 <= low < 1 and high >= 0 and cap > 0):
        raise InputError(f"clip {clip!r} or cap {cap!r}: want 0 <= low < 1, high >= 0, cap > 0")
    masks = None if mask is None else _rows("mask", mask)
    a, b = _pick("rollout", rollout, masks, None), _pick("trainer", trainer, masks, None)
    more = {
        name: _pick(name, values, masks, a)
        for name, values in (("entropies", entropies), ("log_kept_mass", log_kept_mass))
        if values is not None
    }
    found = _measure(a, _same("trainer", b, a), low, high, cap, more)
    if floor is not None:
        again = _measure(_pick("floor", floor, masks, a), b, low, high, cap, {})
        found.update({f"floor/{name}": value for name, value in again.items()})
    return found


def framework_names(framework: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """What `mismatch` found under a framework's own names, floor too. ``framework`` is a key of ``ALIASES``.

    A metric that was not computed (entropy without entropies) is left out. Raises InputError for another framework.
    """
    if framework not in ALIASES:
        raise InputError(f"no framework {framework!r}: there are {', '.join(ALIASES)}")
    return {
        prefix + theirs: metrics[prefix + ours]
        for prefix in ("", "floor/")
        for theirs, ours in ALIASES[framework].items()
        if prefix + ours in metrics
    }


def entropies_of(logprobs: Any) -> Any:
    """Entropy in nats of each distribution. logprobs: [..., vocab], -inf allowed. Returns a float64 array [...]."""
    import numpy as np

    table = _array(logprobs)
    return -np.where(np.isneginf(table), 0.0, np.exp(table) * np.where(np.isneginf(table), 0.0, table)).sum(-1)


def log_kept_mass_of(full: Any, processed: Any) -> Any:
    """Log of the probability that top-k, top-p and min-p kept, of each distribution.

    full, processed: logprobs [..., vocab] of the same temperature and penalties, before and after the filters; what
    ``processed`` has at -inf was removed. Returns a float64 array [...], at most 0. Raises InputError where shapes differ.
    """
    import numpy as np

    before, after = _array(full), _array(processed)
    if before.shape != after.shape:
        raise InputError(f"full has shape {before.shape}, processed {after.shape}: they are of the same tokens")
    kept = np.where(np.isneginf(after), -np.inf, before)
    return np.minimum(np.logaddexp.reduce(kept, axis=-1), 0.0)


def _array(values: Any) -> Any:
    """A tensor, array or nested list as a float64 array."""
    import numpy as np

    if hasattr(values, "detach"):  # a torch tensor, maybe bfloat16, which numpy does not have
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _rows(name: str, values: Any) -> list[Any]:
    """One float64 array a sequence."""
    nested = isinstance(values, Sequence) and any(hasattr(row, "__len__") and getattr(row, "ndim", 1) for row in values)
    try:
        whole = values if nested else _array(values)
        rows = [_array(row) for row in whole] if nested or whole.ndim == 2 else [whole]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: not numbers in [tokens], [batch, steps] or a list of sequences: {error}") from None
    if any(row.ndim != 1 for row in rows):
        raise InputError(f"{name}: want [tokens], [batch, steps] or a list of sequences, one number a token")
    return rows


def _same(name: str, rows: list[Any], other: list[Any]) -> list[Any]:
    """The rows, if they have the other's lengths."""
    mine, theirs = [len(row) for row in rows], [len(row) for row in other]
    if mine != theirs:
        raise InputError(f"{name} has sequences of {_short(mine)} tokens, where {_short(theirs)} are expected")
    return rows


def _short(lengths: list[int]) -> str:
    shown = ", ".join(map(str, lengths[:8]))
    return f"[{shown}{', …' if len(lengths) > 8 else ''}] ({len(lengths)} sequences)"


def _pick(name: str, values: Any, masks: list[Any] | None, other: list[Any] | None) -> list[Any]:
    """The rows of what the mask keeps, checked for values that are no logprob (or no entropy)."""
    import numpy as np

    rows = _rows(name, values)
    if masks is not None:
        if any(not np.isin(mask, (0.0, 1.0)).all() for mask in masks):
            raise InputError("mask: holds values other than 0 and 1")
        _same(name, rows, masks)
        rows = [row[mask == 1] for row, mask in zip(rows, masks)]
    everything = np.concatenate(rows) if rows else np.zeros(0)
    removed = np.isneginf(everything) if name in ("rollout", "trainer", "floor") else False
    wrong = int((~np.isfinite(everything) & ~np.asarray(removed)).sum())
    if wrong:
        raise InputError(f"{name}: {wrong} of {len(everything)} values are nan or infinite")
    if name != "entropies" and len(everything) and everything.max() > _ROUNDING:
        raise InputError(f"{name}: {everything.max():.4g} is above 0, so these are not logprobs (natural logarithms)")
    return rows if other is None else _same(name, rows, other)


def _measure(
    rollout: list[Any], trainer: list[Any], low: float, high: float, cap: float, more: dict[str, list[Any]]
) -> dict[str, float]:
    import numpy as np

    empty = np.zeros(0)
    a, b = np.concatenate([*rollout, empty]), np.concatenate([*trainer, empty])
    owner: Any = np.repeat(np.arange(len(rollout)), [len(row) for row in rollout])
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        raise InputError(f"no token to compare: {len(a)} are left by the mask, and none of them is finite on both sides")
    found = {"outside_rollout": np.isneginf(a).sum(), "outside_trainer": np.isneginf(b).sum()}
    a, b = a[both], b[both]
    _, owner, lengths = np.unique(owner[both], return_inverse=True, return_counts=True)

    def by_sequence(values: Any) -> Any:
        """Each sequence's mean."""
        return np.bincount(owner, values) / lengths

    def ess(weights: Any) -> Any:
        return weights.sum() ** 2 / (len(weights) * (weights**2).sum())

    def outside(values: Any, under: float, over: float) -> Any:
        return (values < under) | (values > over)

    def chi2(log_weights: Any) -> Any:
        return np.expm1(2 * np.clip(log_weights, -_CHI2_LIMIT, _CHI2_LIMIT)).mean()

    with np.errstate(all="ignore"):
        d = b - a
        size, r, p, q = np.abs(d), np.exp(d), np.exp(a), np.exp(b)
        k3, swapped = np.maximum(np.expm1(d) - d, 0.0), np.maximum(np.expm1(-d) + d, 0.0)
        mixture = np.logaddexp(a, b) - np.log(2.0)
        js = 0.5 * (np.expm1(b - mixture) - (b - mixture)) + 0.5 * (np.expm1(a - mixture) - (a - mixture))
        mean_d, sum_d = by_sequence(d), np.bincount(owner, d)
        product = np.exp(sum_d)
        geometric, sequence_error = np.exp(mean_d), by_sequence(np.exp(size))
        truncated, masked = np.minimum(r, cap), np.where(product > cap, 0.0, product)
        clipped = outside(r, 1 - low, 1 + high)
        mean_a, mean_b = by_sequence(a), by_sequence(b)
        p_off, q_off = p - p.mean(), q - q.mean()
        found.update(
            {
                "tokens": len(d),
                "sequences": len(lengths),
                "abs_dlogprob_mean": size.mean(),
                "abs_dlogprob_p50": np.quantile(size, 0.50),
                "abs_dlogprob_p95": np.quantile(size, 0.95),
                "abs_dlogprob_p99": np.quantile(size, 0.99),
                "abs_dlogprob_max": size.max(),
                "abs_dlogprob_mean_by_sequence": by_sequence(size).mean(),
                "kl_rollout_trainer_k1": -d.mean(),
                "kl_rollout_trainer_k2": (d**2).mean() / 2,
                "kl_rollout_trainer_k3": k3.mean(),
                "kl_rollout_trainer_k3_max": k3.max(),
                "kl_rollout_trainer_k1_by_sequence": -mean_d.mean(),
                "kl_rollout_trainer_k3_by_sequence": by_sequence(k3).mean(),
                "kl_trainer_rollout_k1": d.mean(),
                "kl_trainer_rollout_k2": (d**2).mean() / 2,
                "kl_trainer_rollout_k3": swapped.mean(),
                "js_k3": js.mean(),
                "mult_error_token": np.exp(size).mean(),
                "mult_error_sequence_mean": sequence_error.mean(),
                "mult_error_sequence_min": sequence_error.min(),
                "mult_error_sequence_max": sequence_error.max(),
                "ratio_mean": r.mean(),
                "ratio_min": r.min(),
                "ratio_max": r.max(),
                "ratio_mean_by_sequence": by_sequence(r).mean(),
                "ratio_sum": r.sum(),
                "ratio_squared_sum": (r**2).sum(),
                "ratio_outside_0.9_1.1": outside(r, 0.9, 1.1).mean(),
                "ratio_outside_0.8_1.2": outside(r, 0.8, 1.2).mean(),
                "ratio_geometric_mean": geometric.mean(),
                "ratio_product_mean": product.mean(),
                "ratio_truncated_mean": truncated.mean(),
                "ratio_truncated_std": truncated.std(),
                "ratio_truncated_min": truncated.min(),
                "ratio_truncated_max": truncated.max(),
                "ratio_above_cap": (r > cap).mean(),
                "ratio_below_inverse_cap": (r < 1 / cap).mean(),
                "ratio_product_masked_mean": masked.mean(),
                "ratio_product_masked_min": masked.min(),
                "ratio_product_masked_max": masked.max(),
                "clip_rate": clipped.mean(),
                "clip_rate_by_sequence": by_sequence(clipped).mean(),
                "clip_rate_sequence": outside(geometric, 1 - low, 1 + high).mean(),
                "ess": ess(np.exp(d - d.max())),  # the scale cancels
                "ess_truncated": ess(truncated),
                "ess_sequence": ess(np.exp(sum_d - sum_d.max())),
                "chi2_token": chi2(d),
                "chi2_sequence_product": chi2(sum_d),
                "chi2_sequence_geometric": chi2(mean_d),
                "pearson_probs": (p_off * q_off).sum() / np.sqrt((p_off**2).sum() * (q_off**2).sum()),
                "abs_dprob_mean": np.abs(p - q).mean(),
                "abs_dprob_std": np.abs(p - q).std(ddof=1) if len(d) > 1 else np.nan,
                "abs_dprob_max": np.abs(p - q).max(),
                "logprob_rollout_by_sequence": mean_a.mean(),
                "logprob_trainer_by_sequence": mean_b.mean(),
                "log_ppl_rollout": -mean_a.mean(),
                "log_ppl_trainer": -mean_b.mean(),
                "ppl_rollout": np.exp(-mean_a).mean(),
                "ppl_trainer": np.exp(-mean_b).mean(),
                "ppl_ratio": np.exp(-mean_d).mean(),
                "log_ppl_abs_diff": np.abs(mean_d).mean(),
                "log_ppl_diff_min": (-mean_d).min(),
                "log_ppl_diff_max": (-mean_d).max(),
                "entropy_sampled": -a.mean(),
                "entropy_importance_weighted": -(r * b).mean(),
            }
        )
        if "entropies" in more:
            entropies = np.concatenate([*more["entropies"], empty])[both]
            found["entropy"] = entropies.mean()
            found["entropy_by_sequence"] = by_sequence(entropies).mean()
            found["kl_entropy_ratio"] = k3.mean() / entropies.mean()
        if "log_kept_mass" in more:
            mass = np.concatenate([*more["log_kept_mass"], empty])[both]
            found["kept_mass_mean"] = np.exp(mass).mean()
            found["kept_mass_min"] = np.exp(mass).min()
            found["kept_mass_bias"] = mass.mean()
            found["ratio_renormalized_mean"] = np.exp(d - mass).mean()
    return {name: float(found[name]) for name in FORMULAS if name in found}
