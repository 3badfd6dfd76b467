"""
One side's logprobs, fitted: which semantics and which paths predict them best, and what rounding leaves of that.

Every combination of semantic faults (`vllm_compat.reference.semantics`) and every path (older weights, KV blocks of older
weights, part of an update) predicts what a side would have returned. The combination that leaves the least is taken; a fault
counts only if it takes away a tenth of what is left without it, a path only if it halves what its sequence leaves.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_compat.reference import MIXES, V0, Effect, Mix, Reference, Schedule, Semantics, Weights, effect, semantics
from vllm_compat.rollouts import Rollout

LEAST = 1e-4  # nats: a mean difference below this changes an importance ratio by less than 0.01 %
OUTSIDE = 1.0  # nats that a token outside a prediction's kept set counts as
_TAKES = 0.9  # a fault is named if it leaves at most this much of what was left without it
_BLOCKS = (16, 32, 64, 128)  # KV block sizes: vLLM's defaults on GPUs and CPUs
_WIDER = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}
_MANTISSA = {"bfloat16": 7, "float16": 10}


@dataclass(frozen=True, slots=True)
class Path:
    """Another way to compute a sequence: the cause it would be, which of its kind, and how."""

    cause: str
    detail: str
    schedule: Schedule


def schedule_of(rollout: Rollout, versions: Sequence[Weights]) -> Schedule:
    """One version a token. Token t comes from the forward pass over the position before it, the first from the whole prompt."""
    found: list[tuple[Weights, int]] = []
    for t, version in enumerate(versions):
        if not found or found[-1][0] != version:
            found.append((version, len(rollout.prompt_ids) - 1 + t if t else 0))
    return tuple(found)


class Scorer:
    """Predictions, each computed once."""

    def __init__(self, rollouts: Sequence[Rollout], reference: Reference, progress: Callable[[str], None]) -> None:
        self.rollouts, self.reference, self.progress = rollouts, reference, progress
        self._found: dict[tuple[int, Schedule, str, bool], dict[Effect, Any]] = {}
        self._effects: dict[tuple[int, Semantics], Effect] = {}
        # Of combinations that come to the same for all rows, the one with the fewest faults.
        distinct: dict[Any, Semantics] = {}
        kinds = {str(sorted(r.sampling_params.items(), key=str)): r.sampling_params for r in rollouts}
        for how in semantics():
            distinct.setdefault(tuple(effect(params, how) for params in kinds.values()), how)
        self.semantics = list(distinct.values())

    def score(
        self, what: Mapping[int, Schedule], dtype: str, why: str, hows: Sequence[Semantics], *, alone: bool = False
    ) -> None:  # fmt: skip
        """Have the predictions of these sequences, under these semantics, ready for `get`."""
        wanted = {
            i: {self._effect(i, how) for how in hows} - set(self._found.get((i, s, dtype, alone), ())) for i, s in what.items()
        }
        missing = [i for i in what if wanted[i]]
        if not missing:
            return
        made = self.reference.predict(
            [self.rollouts[i] for i in missing], [what[i] for i in missing], [wanted[i] for i in missing], dtype, alone=alone,
            progress=lambda done: self.progress(f"scoring, {why}: {done} of {len(missing)} sequences, {dtype}"),
        )  # fmt: skip
        for i, predictions in zip(missing, made):
            self._found.setdefault((i, what[i], dtype, alone), {}).update(predictions)

    def get(self, i: int, schedule: Schedule, dtype: str, how: Semantics, *, alone: bool = False) -> Any:
        """Predicted logprobs of sequence i, float64 [tokens]."""
        return self._found[i, schedule, dtype, alone][self._effect(i, how)]

    def _effect(self, i: int, how: Semantics) -> Effect:
        if (i, how) not in self._effects:
            self._effects[i, how] = effect(self.rollouts[i].sampling_params, how)
        return self._effects[i, how]


def gap_of(values: Any, predicted: Any) -> Any:
    """|difference| per token; `OUTSIDE` where one of them is -inf, 0 where both are or nothing is compared."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        sizes = np.abs(values - predicted)
    inside = np.isfinite(values) & np.isfinite(predicted)
    return np.where(inside, sizes, np.where(np.isneginf(values) ^ np.isneginf(predicted), OUTSIDE, 0.0))


class Side:
    """One side's logprobs and what predicts them best."""

    def __init__(self, name: str, values: list[Any], tops: list[Any], dtype: str, schedules: list[Schedule]) -> None:
        import numpy as np

        self.name, self.tops, self.dtype, self.base = name, tops, dtype, schedules
        self.values = [np.array(row) for row in values]
        self.tokens = sum(int((~np.isnan(row)).sum()) for row in self.values)
        self.how, self.paths = V0, dict[int, Path]()
        self.head, self.head_evidence, self.floor, self.size = "unknown", "", dict[str, float](), 0.0
        self.worst_token = 0.0

    def gaps(self, scorer: Scorer, how: Semantics, paths: bool = True) -> Any:
        """|side - prediction| per token, all sequences one after the other."""
        import numpy as np

        chosen = self.paths if paths else {}
        return np.concatenate(
            [
                gap_of(row, scorer.get(i, chosen[i].schedule if i in chosen else self.base[i], self.dtype, how))
                for i, row in enumerate(self.values)
            ]
        )

    def limits(self, scorer: Scorer, how: Semantics) -> Any:
        """What rounding may come to per token, in the order of `gaps`. 16-bit rounding also moves a token across the edge of what
        top-k, top-p and min-p keep, which counts as `OUTSIDE`; many such tokens show in the mean."""
        import numpy as np

        if self.dtype == "float32":
            return np.full(sum(map(len, self.values)), self.worst_token)
        kept = [np.isneginf(scorer.get(i, self._schedule(i), self.dtype, how)) for i in range(len(self.values))]
        crossed = np.concatenate(kept) ^ np.isneginf(np.concatenate(self.values))
        return np.where(crossed, OUTSIDE, self.worst_token)

    def _schedule(self, i: int) -> Schedule:
        return self.paths[i].schedule if i in self.paths else self.base[i]

    def fit(self, scorer: Scorer, head: str) -> None:
        """Find what predicts this side: ``how`` (semantics), ``paths`` of sequences, ``head``."""
        values = self._rounded_values()
        grid = self._grid(scorer)
        possible = [how for how in scorer.semantics if how.result == "float32" or values]
        usable = [how for how in possible if how.head == "float32" or grid != "float32"]
        scorer.score(dict(enumerate(self.base)), self.dtype, f"{self.name}", possible)
        self._choose(scorer, usable)
        self._set_floor(scorer)
        for _ in range(3):  # paths were sought under the semantics chosen without them
            before = self.how
            self.paths = {}
            self._fit_paths(scorer)
            if self.paths:
                scorer.score({i: path.schedule for i, path in self.paths.items()}, self.dtype, f"{self.name}'s paths", possible)
                self._choose(scorer, usable)
                self._set_floor(scorer)
            if self.how == before:
                break
        self._find_head(scorer, grid, head)

    def _choose(self, scorer: Scorer, usable: list[Semantics]) -> None:
        """The semantics that leave the least, at a tenth a fault, of those whose every fault shows in the tokens."""
        least = LEAST * self.tokens
        left = {how: float(self.gaps(scorer, how).sum()) + least for how in usable}
        ranked = sorted(usable, key=lambda how: math.log(left[how]) - math.log(_TAKES) * len(how.faults))
        self.how = next(how for how in ranked if all(self._shows(scorer, how, fault) for fault in how.faults))

    def _shows(self, scorer: Scorer, how: Semantics, fault: str) -> bool:
        """Whether this side moves with what the fault would change, token by token: a slope between a half and two.

        Another distribution altogether can come nearer in the mean by a wrong temperature, but not token by token.
        """
        import numpy as np

        without = self._predicted(scorer, replace(how, **{fault: getattr(V0, fault)}))
        change, seen = self._predicted(scorer, how) - without, np.concatenate(self.values) - without
        both = np.isfinite(change) & np.isfinite(seen)
        if both.sum() < 2 or not np.ptp(change[both]):
            return True  # it shows in what is kept only
        slope = float(np.cov(change[both], seen[both])[0, 1] / np.var(change[both], ddof=1))
        return 0.5 < slope < 2

    def _predicted(self, scorer: Scorer, how: Semantics) -> Any:
        import numpy as np

        chosen = [scorer.get(i, self._schedule(i), self.dtype, how) for i in range(len(self.base))]
        return np.where(np.isneginf(found := np.concatenate(chosen)), np.nan, found)

    def _set_floor(self, scorer: Scorer) -> None:
        """Mean nats: what rounding may come to for the chosen semantics."""
        import numpy as np

        how, rows = self.how, list(enumerate(self.base))
        scorer.score(dict(rows), _WIDER[self.dtype], "the rounding floor", [how])
        scorer.score(dict(rows), self.dtype, "the batch's part of it", [how], alone=True)
        plain = [scorer.get(i, schedule, self.dtype, how) for i, schedule in rows]
        wider = [scorer.get(i, schedule, _WIDER[self.dtype], how) for i, schedule in rows]
        alone = [scorer.get(i, schedule, self.dtype, how, alone=True) for i, schedule in rows]
        precision = np.concatenate([gap_of(a, b) for a, b in zip(plain, wider)])
        batch = np.concatenate([gap_of(a, b) for a, b in zip(plain, alone)])
        found = {"precision": 2 * float(precision.sum()) / self.tokens, "batch": float(batch.sum()) / self.tokens}
        self.floor = {**found, "floor": max(LEAST, *found.values())}
        self.worst_token = max(2 * float(precision.max()), float(batch.max()), 10 * LEAST)

    def _fit_paths(self, scorer: Scorer) -> None:
        """For each sequence above the floor, another path that leaves less than half of it."""
        versions = list(scorer.reference.versions)
        if len(versions) < 2:
            return
        bad = {
            i: gap.mean()
            for i in range(len(self.values))
            if (gap := self._path_gap(scorer, i, self.base[i])).mean() > self._sequence_floor(i)
        }
        tried: dict[int, list[Path]] = {i: self._candidates(scorer, i, versions) for i in bad}
        for place in range(max(map(len, tried.values()), default=0)):
            wave = {i: paths[place].schedule for i, paths in tried.items() if place < len(paths)}
            scorer.score(wave, self.dtype, f"other paths of the {self.name}, {place + 1}", [self.how])
        for i, paths in tried.items():
            self._take(scorer, i, paths)
        failed = 0
        for i in sorted(bad, key=lambda i: -bad[i]):
            known = [self.paths[i]] if i in self.paths else []
            rest = self._path_gap(scorer, i, known[0].schedule).mean() if known else bad[i]
            # Where three in a row follow no update, the others will not either.
            if self.name == "rollout" and rest > self._sequence_floor(i) and failed < 3:
                path = self._follow(scorer, i, versions)
                self._take(scorer, i, [*known, *([path] if path else [])])
                failed = 0 if path else failed + 1

    def _sequence_floor(self, i: int) -> float:
        """The floor is a mean over all tokens; that of n scatters by about 1/sqrt(n) of it, and four times that is rare."""
        return self.floor["floor"] * (1 + 4 / math.sqrt(max(len(self.values[i]), 1)))

    def _path_gap(self, scorer: Scorer, i: int, schedule: Schedule) -> Any:
        """|sequence i - prediction| on this path. In 16-bit dtypes without the tokens that the named weights put on the other
        side of a truncation's edge: rounding does that, and one of them would outweigh a sequence."""
        import numpy as np

        row, named = self.values[i], scorer.get(i, self.base[i], self.dtype, self.how)
        gap = gap_of(row, scorer.get(i, schedule, self.dtype, self.how))
        crossed = np.isneginf(named) ^ np.isneginf(row)
        return gap if self.dtype == "float32" else np.where(crossed, 0.0, gap)

    def _take(self, scorer: Scorer, i: int, paths: list[Path]) -> None:
        """Keep the path that leaves the least, if that is less than half."""

        def left(schedule: Schedule) -> float:
            return float(self._path_gap(scorer, i, schedule).sum())

        best = min(paths, key=lambda path: left(path.schedule), default=None)
        if best and left(best.schedule) < left(self.base[i]) / 2:
            self.paths[i] = best

    def _candidates(self, scorer: Scorer, i: int, versions: list[int]) -> list[Path]:
        """(cause, detail, schedule): other versions; older weights' KV blocks under the named ones."""
        named, prompt = self.base[i], scorer.rollouts[i].prompt_ids
        current = named[-1][0]
        assert isinstance(current, int)
        found: list[Path] = []
        for other in versions:
            behind = versions.index(current) - versions.index(other)
            if len(named) > 1 or other != current:
                found.append(Path("stale_weights", _updates(behind), ((other, 0),)))
        if self.name == "trainer" or len(named) > 1:
            return found
        shared = max((_common(prompt, r.prompt_ids) for j, r in enumerate(scorer.rollouts) if j != i), default=0)
        # A hit covers whole blocks and leaves the prompt's last token to compute.
        cached = {min(length, len(prompt) - 1) // block * block for length in (len(prompt), shared) for block in _BLOCKS}
        for other, length in itertools.product(reversed(versions), sorted(cached - {0}, reverse=True)):
            if other != current:
                behind = versions.index(current) - versions.index(other)
                found.append(Path("stale_prefix_cache", f"{length} tokens, {_updates(behind)}", ((other, 0), (current, length))))
        return found

    def _follow(self, scorer: Scorer, i: int, versions: list[int]) -> Path | None:
        """The weights token by token: from each place on those (a version, or part of one) that explain most."""
        values, rollout = self.values[i], scorer.rollouts[i]
        tolerance = max(10 * LEAST, 4 * self.floor["floor"])
        kinds: list[Weights] = [*versions, *(Mix(a, b, part) for a, b in itertools.pairwise(versions) for part in MIXES)]
        schedule: Schedule = ()
        place = 0
        while place < len(values) and len(schedule) < 6:
            best: tuple[int, float, Schedule] = (place + 1, 0.0, ())
            # A token near the change may fit both: it is looked for a little before, too.
            for start, weights in itertools.product(range(max(place - 2, 1), place + 1) if schedule else (0,), kinds):
                if schedule and (weights == schedule[-1][0] or len(rollout.prompt_ids) - 1 + start <= schedule[-1][1]):
                    continue
                trial = (*schedule, (weights, len(rollout.prompt_ids) - 1 + start if start else 0))
                scorer.score({i: trial}, self.dtype, f"following {rollout.where}", [self.how])
                gap = self._path_gap(scorer, i, trial)
                off = [t for t in range(place, len(gap)) if gap[t] > tolerance and gap[t : t + 4].mean() > tolerance]
                end = off[0] if off else len(gap)
                best = max(best, (end, -float(gap[place:end].sum()), trial), key=lambda run: run[:2])
            if not best[2]:
                return None
            place, _, schedule = best
        used = [weights for weights, _ in schedule]
        mixes = [f"{w.part} of the parameters of {w.new}, the others of {w.old}" for w in used if isinstance(w, Mix)]
        if mixes:
            return Path("mixed_weights", mixes[0], schedule)
        return Path("unreported_update", f"from {used[0]} to {used[-1]}", schedule)

    def _rounded_values(self) -> bool:
        """Whether the logprobs themselves are 16-bit numbers: the lower half of their float32 bits is 0."""
        import numpy as np

        values = np.concatenate(self.values)
        values = values[np.isfinite(values) & (values < -1e-3)]
        single = values.astype(np.float32)
        return bool(len(values) >= 8 and (single == values).all() and (single.view(np.uint32) & 0xFFFF == 0).mean() > 0.99)

    def _grid(self, scorer: Scorer) -> str:
        """From top-n logprobs: whether the logits behind them are 16-bit numbers. "rounded", "float32" or "unknown".

        logprob = logit / temperature - constant, so differences within a row, times the temperature, are differences of
        logits. Of 16-bit logits of size 1 and more they are multiples of 2^-7 (bfloat16), to float32 precision; others are by
        chance: 2 · 4e-5 · 2^7, one in a hundred.
        """
        import numpy as np

        step, near = 2.0 ** -_MANTISSA.get(self.dtype, 7), 4e-5
        on: dict[str, list[Any]] = defaultdict(list)
        for rollout, rows in zip(scorer.rollouts, self.tops):
            stated = float(rollout.sampling_params.get("temperature", 1.0)) or 1.0
            for row in rows or ():
                values = np.array(sorted((v for v in row.values() if np.isfinite(v)), reverse=True))
                for name, temperature in {"stated": stated, "raw": 1.0}.items() if len(values) > 2 else ():
                    apart = temperature * (values[0] - values[1:]) / step
                    on[name].append(np.abs(apart - apart.round()) * step < near)
        shares = {name: float(np.concatenate(parts).mean()) for name, parts in on.items()}
        rows = len(on["stated"])
        if not rows:
            return "unknown"
        best, chance = max(shares.values()), 2 * near / step
        grain = f"2^{int(math.log2(step))}"
        evidence = f"{best:.0%} of the differences of logits in {rows} top-n rows are multiples of {grain}"
        self.head_evidence = f"{evidence}, {chance:.0%} would be by chance"
        return "rounded" if best > 0.5 else "float32" if best < 0.1 else "unknown"

    def _find_head(self, scorer: Scorer, grid: str, said: str) -> None:
        """``head`` and its evidence: from top-n, else from the fit, else what was said."""
        plain, rounded = replace(self.how, head="float32"), replace(self.how, head="rounded")
        left = float(self.gaps(scorer, plain).mean())
        self.size = _mean_between(scorer, self, plain, rounded)
        if grid != "unknown":
            self.head = grid
            return
        other = float(self.gaps(scorer, rounded).mean())
        self.head_evidence = f"mean error {left:.2g} nats as a float32 head, {other:.2g} as a rounded one"
        if self.how.head == "rounded":
            self.head = "rounded"
        elif left < _TAKES * other:
            self.head = "float32"
        else:
            self.head = said
            self.head_evidence = f"as stated; the data do not tell ({self.head_evidence})"


def _mean_between(scorer: Scorer, side: Side, a: Semantics, b: Semantics) -> float:
    """Mean |difference| of two predictions."""
    gaps = [gap_of(scorer.get(i, s, side.dtype, a), scorer.get(i, s, side.dtype, b)).sum() for i, s in enumerate(side.base)]
    return float(sum(gaps)) / side.tokens


def _updates(behind: int) -> str:
    count = abs(behind)
    return f"{count} update{'s' if count != 1 else ''} {'behind' if behind >= 0 else 'ahead'}"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
