"""
Why trainer and rollout disagree: the mismatch attributed to causes, by recomputing what each side should have returned.

With R and T the logprobs of rollout and trainer (nats, sampled tokens), and R*, T* what a V0-equivalent side returns under the
weights it names (`vllm_compat.reference`):

    T - R  =  (T - T*)  +  (T* - R*)  +  (R* - R)
              trainer      objective     rollout

The middle term is policy lag, which the algorithm corrects. Each outer term is fitted: every combination of semantic faults and
every path (older weights, stale prefix, part of an update) predicts that side's logprobs, and the prediction that leaves the
least is taken, a fault counting only if it takes away a tenth of what is left without it.

**Shares** are of S = sum |T - T*| + |T* - R*| + |R* - R|, so they add up to 1 and do not cancel, whereas the terms themselves
can (raw on both sides: no mismatch, two faults). A cause's share is its Shapley value: the mean, over the orders in which the
named causes can be taken away, of what it takes from sum |side - prediction| (L. Shapley, 1953). A token that a prediction
does not keep counts as `OUTSIDE` nats.

**The floor.** Two correct implementations differ by rounding. Each is off from exact arithmetic by e, so they lie within 2 mean
|e| of each other (triangle inequality); e is measured: the model's forward pass against the next wider dtype. The floor is the
greatest of this, of what batch size changes, and of `LEAST`. What remains above it is "unexplained".

Needs torch, transformers and numpy when it is called.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_compat import metrics
from vllm_compat.fitting import Scorer, Side, gap_of, schedule_of
from vllm_compat.reference import V0, Reference
from vllm_compat.rollouts import Rollout

NAMED = 0.02  # a smaller unexplained share is not held against a pair


@dataclass(frozen=True, slots=True)
class Cause:
    """What a name means, and what to change on either side."""

    layer: str
    means: str
    rollout: str
    trainer: str = ""  # the same


_SEMANTIC = "VLLM_COMPAT_PROCESSED_LOGPROBS=1 (the default of `import vllm_compat`)"
_LINE = "score with vllm_compat.trainer.processed_logprobs(logits, tokens, sampling_params)"
_UPDATE = "send updates inside `with vllm_compat.weight_update(engine)` (VLLM_COMPAT_SYNCHRONIZED_WEIGHT_UPDATE=1)"
CAUSES: dict[str, Cause] = {
    "raw_logprobs": Cause("semantic", "log-softmax of the raw logits", _SEMANTIC, _LINE),
    "temperature_never": Cause("semantic", "the temperature is not applied", _SEMANTIC, _LINE),
    "temperature_twice": Cause(
        "semantic", "the temperature is applied twice", "give the temperature to the engine or to the logits, not to both",
        "divide by the temperature in one place only: " + _LINE,
    ),
    "penalties_ignored": Cause("semantic", "repetition, frequency and presence penalties are not applied", _SEMANTIC, _LINE),
    "truncation_not_renormalized": Cause(
        "semantic", "the full vocabulary's probability, not that of what top-k, top-p and min-p keep", _SEMANTIC, _LINE
    ),
    "min_p_first": Cause("semantic", "min-p before top-k and top-p, V1's order", _SEMANTIC, _LINE),
    "greedy_one_hot": Cause("semantic", "greedy rows divided by a temperature of almost 0", _SEMANTIC, _LINE),
    "greedy_negated": Cause("semantic", "greedy rows divided by -1, V1's placeholder for greedy", _SEMANTIC, _LINE),
    "bfloat16_head": Cause(
        "inference path", "logits rounded to 16 bits", "VLLM_COMPAT_FP32_LM_HEAD=1, and the same head on the trainer",
        "vllm_compat.trainer.fp32_lm_head(model), and the same head on the rollout",
    ),
    "one_sided_head": Cause(
        "inference path", "float32 lm_head on one side only, which is worse than on none: this side rounds its logits to 16 bits",
        "VLLM_COMPAT_FP32_LM_HEAD=1: the trainer has a float32 head",
        "vllm_compat.trainer.fp32_lm_head(model): the rollout has one",
    ),
    "bfloat16_logprobs": Cause(
        "inference path", "the logprobs themselves are rounded to 16 bits", "keep logprobs in float32 on their way here",
        "take log_softmax of float32 logits: " + _LINE,
    ),
    "stale_weights": Cause(
        "inference path", "weights of another version than named", _UPDATE + ", and read the version after it",
        "score before the optimizer steps, or name the version that scored",
    ),
    "stale_prefix_cache": Cause(
        "inference path", "the prompt's KV blocks come from older weights",
        "VLLM_COMPAT_NO_PREFIX_CACHING=1, or reset the prefix cache at each update",
    ),
    "mixed_weights": Cause(
        "inference path", "part of an update: some parameters are new, some old",
        _UPDATE + "; check that every parameter arrives",
        "load all parameters",
    ),
    "shared_seed": Cause(
        "inference path", "several stochastic requests drew the same tokens",
        "VLLM_COMPAT_UNSHARED_ENGINE_SEED=1, or a seed for each",
    ),
    "unreported_update": Cause(
        "objective", "the weights changed inside requests, between two tokens, and the rows do not say so",
        "give rollout_version for each token", "",
    ),
    "policy_lag": Cause(
        "objective", "the trainer scores with other weights than sampled",
        "no fault: importance ratios correct it; sample with newer weights for less",
    ),
    "rounding": Cause(
        "inference path", "rounding of two correct implementations", "no fault; batch-invariant kernels where it must be less"
    ),
    "unexplained": Cause("unexplained", "no known fault predicts it", "docs/diagnose.md, Limits, says what is not covered"),
}  # fmt: skip
_FAULTS = {
    "raw": "raw_logprobs", "penalties": "penalties_ignored", "head": "bfloat16_head", "result": "bfloat16_logprobs",
    "never": "temperature_never", "twice": "temperature_twice", "none": "truncation_not_renormalized",
    "min-p first": "min_p_first", "one-hot": "greedy_one_hot", "negated": "greedy_negated",
}  # fmt: skip
_NO_FAULT = ("rounding", "policy_lag")


@dataclass(frozen=True, slots=True)
class Finding:
    """One row. ``share`` is of the sum of the parts, ``nats`` that share per token."""

    cause: str
    layer: str
    side: str
    share: float
    nats: float
    evidence: str
    change: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found; ``findings`` by share. ``parts`` are mean nats a token: trainer, objective, rollout, and |T - R|."""

    findings: list[Finding]
    parts: dict[str, float]
    floors: dict[str, dict[str, float]]
    heads: dict[str, str]
    metrics: dict[str, float]
    notes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is to be repaired: no fault named, nothing unexplained beyond `NAMED`."""
        return all(f.cause in _NO_FAULT or (f.cause == "unexplained" and f.share < NAMED) for f in self.findings)

    @property
    def named(self) -> set[str]:
        """The causes that are faults."""
        return {f.cause for f in self.findings} - {*_NO_FAULT, "unexplained"}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"healthy": self.healthy, **asdict(self)}


def diagnose(
    rollouts: Sequence[Rollout], models: Mapping[int, Path], *, dtype: str,
    heads: Mapping[str, str] | None = None, device: str = "cpu", batch_size: int = 8,
    progress: Callable[[str], None] = lambda text: None,
) -> Diagnosis:  # fmt: skip
    """Attribute the mismatch of these sequences to causes.

    models: weight version -> transformers model folder. Rows that name no version mean the newest.
    dtype: of the forward passes of both sides: "float32", "bfloat16" or "float16".
    heads: what is known of "rollout" and "trainer": "float32" or "rounded"; evidence in the data goes before it.
    progress: called with a line of text as the work goes on.

    Raises InputError for sequences that the models cannot score, and where no token is finite on both sides.
    """
    reference = Reference(models, device=device, batch_size=batch_size)
    reference.check(rollouts)
    found = metrics.mismatch(
        [r.rollout_logprobs for r in rollouts],
        [r.trainer_logprobs for r in rollouts],
        mask=[list(map(float, r.mask)) for r in rollouts],
    )
    newest = max(models)
    trainer = Side(
        "trainer", [r.trainer_logprobs for r in rollouts], [r.trainer_top_logprobs for r in rollouts], dtype,
        [((newest if r.trainer_version is None else r.trainer_version, 0),) for r in rollouts],
    )  # fmt: skip
    rollout = Side(
        "rollout", [r.rollout_logprobs for r in rollouts], [r.top_logprobs for r in rollouts], dtype,
        [schedule_of(r, r.rollout_version or [newest] * len(r.token_ids)) for r in rollouts],
    )  # fmt: skip
    scorer = Scorer(rollouts, reference, progress)
    for side in (trainer, rollout):
        side.fit(scorer, (heads or {}).get(side.name, "unknown"))
    return _report(scorer, trainer, rollout, found)


def _report(scorer: Scorer, trainer: Side, rollout: Side, found: dict[str, float]) -> Diagnosis:
    import numpy as np

    lag = sum(
        float(
            gap_of(
                scorer.get(i, ours, trainer.dtype, V0), np.where(np.isnan(row), row, scorer.get(i, theirs, rollout.dtype, V0))
            ).sum()
        )
        for i, (ours, theirs, row) in enumerate(zip(trainer.base, rollout.base, trainer.values))
    )
    sizes = {side.name: float(side.gaps(scorer, V0, paths=False).sum()) for side in (trainer, rollout)}
    total, tokens = sum(sizes.values()) + lag, trainer.tokens
    rows: list[tuple[str, str, float, str]] = []  # cause, side, nats, evidence
    if lag:
        rows.append(
            ("policy_lag", "both", lag, f"mean |expected trainer - expected rollout| {lag / tokens:.2g} nats, by their versions")
        )
    one_sided = {trainer.head, rollout.head} == {"float32", "rounded"}
    for side in (trainer, rollout):
        rows += _side_rows(scorer, side, one_sided)
    shared = _shared_seed(scorer.rollouts)
    rows += [("shared_seed", "rollout", 0.0, shared)] if shared else []
    findings = [
        Finding(
            cause, CAUSES[cause].layer, side, nats / total if total else 0.0, nats / tokens, evidence,
            (CAUSES[cause].trainer if side == "trainer" else "") or CAUSES[cause].rollout,
        )
        for cause, side, nats, evidence in sorted(rows, key=lambda row: -row[2])
    ]  # fmt: skip
    notes = []
    difference = found["abs_dlogprob_mean"]
    if difference < 0.5 * total / tokens and any(side.how.faults or side.paths for side in (trainer, rollout)):
        notes.append("the parts cancel: both sides are off the same way, so the mismatch is smaller than its causes")
    for side in (trainer, rollout):
        if side.head == "unknown" and (side.dtype != "float32" or "rounded" in (trainer.head, rollout.head)):
            field_ = "top_logprobs" if side.name == "rollout" else "trainer_top_logprobs"
            notes.append(
                f"the {side.name}'s lm_head cannot be told from these data: record {field_} (3 or more), or say "
                f"--{side.name}-head"
            )
    for name in ("outside_rollout", "outside_trainer"):
        if found[name]:
            notes.append(f"{found[name]:.0f} tokens have a logprob of -inf on the side of the {name.removeprefix('outside_')}")
    parts = {
        "difference": difference,
        "trainer": sizes["trainer"] / tokens,
        "objective": lag / tokens,
        "rollout": sizes["rollout"] / tokens,
    }
    return Diagnosis(
        findings, parts, {side.name: side.floor for side in (trainer, rollout)},
        {side.name: side.head for side in (trainer, rollout)}, found, notes,
    )  # fmt: skip


def _side_rows(scorer: Scorer, side: Side, one_sided: bool) -> list[tuple[str, str, float, str]]:
    """What one side's error is made of: causes, rounding, unexplained."""
    import numpy as np

    rows: list[tuple[str, str, float, str]] = []
    owner: Any = np.repeat(np.arange(len(side.values)), [len(row) for row in side.values])
    head = "one_sided_head" if one_sided else "bfloat16_head"
    for fault, (nats, evidence) in _shapley(scorer, side).items():
        if fault == "path":
            for cause in sorted({path.cause for path in side.paths.values()}):
                chosen = [i for i, path in side.paths.items() if path.cause == cause]
                details = Counter(side.paths[i].detail for i in chosen)
                what = "; ".join(f"{detail} ({count})" for detail, count in details.most_common(3))
                rows.append(
                    (
                        cause,
                        side.name,
                        float(nats[np.isin(owner, chosen)].sum()),
                        f"{len(chosen)} of {len(side.values)} sequences: {what}",
                    )
                )
        elif fault == "head":
            rows.append((head, side.name, float(nats.sum()), side.head_evidence or evidence))
        else:
            value = getattr(side.how, fault)
            rows.append(
                (
                    _FAULTS[value if isinstance(value, str) and value != "rounded" else fault],
                    side.name,
                    float(nats.sum()),
                    evidence,
                )
            )
    left = side.gaps(scorer, side.how)
    rest = float(left.sum())
    if side.head == "rounded" and side.how.head == "float32":
        # Which way each logit was rounded is hidden by the rest of the rounding; its size is known, and adds in squares.
        size = min(side.size * side.tokens, rest)
        part = rest - math.sqrt(rest**2 - size**2)
        rows.append((head, side.name, part, f"{side.head_evidence}; the share is an estimate from the size of that rounding"))
        rest -= part
    excess = max(0.0, rest - side.floor["floor"] * side.tokens, float(np.maximum(left - side.limits(scorer, side.how), 0).sum()))
    rounding = rest - excess
    if rounding:
        precision, batch = side.floor["precision"], side.floor["batch"]
        evidence = f"floor {side.floor['floor']:.2g} nats: {precision:.2g} by precision, {batch:.2g} by batch size"
        rows.append(("rounding", side.name, rounding, evidence))
    if excess:
        worst = int(np.bincount(owner, left).argmax())
        evidence = (
            f"{rest / side.tokens:.2g} nats are left, the floor is {side.floor['floor']:.2g}; most in "
            f"{scorer.rollouts[worst].where}, token {int(left[owner == worst].argmax())}"
        )
        rows.append(("unexplained", side.name, excess, evidence))
    return rows


def _shapley(scorer: Scorer, side: Side) -> dict[str, tuple[Any, str]]:
    """Fault of the fit, or "path": what it takes from |side - prediction|, per token, and the evidence."""
    players = [*side.how.faults, *(["path"] if side.paths else [])]

    def left(taken: tuple[str, ...]) -> Any:
        how = replace(V0, **{name: getattr(side.how, name) for name in taken if name != "path"})
        return side.gaps(scorer, how, "path" in taken)

    gaps = {taken: left(taken) for size in range(len(players) + 1) for taken in itertools.combinations(players, size)}
    found = {}
    for player in players:
        nats = 0.0
        for taken, before in gaps.items():
            if player not in taken:
                weight = math.factorial(len(taken)) * math.factorial(len(players) - len(taken) - 1) / math.factorial(len(players))
                after = gaps[tuple(name for name in players if name in taken or name == player)]
                nats = nats + weight * (before - after)
        without = gaps[tuple(name for name in players if name != player)].sum() / side.tokens
        found[player] = (
            nats,
            f"mean error {without:.2g} nats without it, {gaps[tuple(players)].sum() / side.tokens:.2g} with it",
        )
    return found


def _shared_seed(rollouts: Sequence[Rollout]) -> str:
    """What shows that unseeded stochastic requests drew the same tokens; "" where nothing does."""
    groups: dict[Any, list[Rollout]] = {}
    for r in rollouts:
        params = {key: value for key, value in r.sampling_params.items() if value is not None}
        if "seed" not in params and params.get("temperature", 1.0) > 0:
            groups.setdefault((tuple(r.prompt_ids), str(sorted(params.items(), key=str))), []).append(r)
    same, chance, engines = 0, 0.0, set[str]()
    for group in groups.values():
        for a, b in itertools.combinations(group, 2):
            if a.engine is not None and a.engine == b.engine:
                continue
            chance += math.exp(sum(v for v, keep in zip(a.rollout_logprobs, a.mask) if keep))
            if a.token_ids == b.token_ids:
                same += 1
                engines |= {e for e in (a.engine, b.engine) if e}
    if not same or chance > 1e-3 * same:
        return ""
    of = f" from the engines {', '.join(sorted(engines))}" if engines else ""
    return f"{same} pairs of requests{of} with one prompt have the same completion; by chance {chance:.1g} would"


def text(found: Diagnosis) -> str:
    """The diagnosis for people."""
    n, parts = found.metrics, found.parts
    lines = [
        f"{n['sequences']:.0f} sequences, {n['tokens']:.0f} tokens: |trainer - rollout| {parts['difference']:.3g} nats a token, "
        f"k3 {n['kl_rollout_trainer_k3']:.3g}, mean ratio {n['ratio_mean']:.4f}",
        f"from what was expected: trainer {parts['trainer']:.3g}, rollout {parts['rollout']:.3g}; "
        f"objective {parts['objective']:.3g}",
        f"lm_head: trainer {found.heads['trainer']}, rollout {found.heads['rollout']}",
        "",
    ]
    for f in found.findings:
        lines.append(f"{f.share:7.1%}  {f.cause}  ({f.layer}; {f.side})")
        lines.append(f"         {CAUSES[f.cause].means}: {f.evidence}")
        lines.append(f"         -> {f.change}")
    lines += [f"note: {note}" for note in found.notes]
    if found.healthy:
        lines.append("healthy: nothing beyond the rounding floor but what the versions say")
    else:
        named = ", ".join(sorted(found.named)) or "no known cause"
        lines.append(f"not healthy: {named}; unexplained {sum(f.share for f in found.findings if f.cause == 'unexplained'):.1%}")
    return "\n".join(lines)
