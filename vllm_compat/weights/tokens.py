"""
Which weights made which token, and which made the KV cache that it was computed from.

The engine core knows, between two steps: it marks each batch of outputs with the version of the weights that computed it, in the
same message. So whoever reads a token knows its version, whatever else is under way: several API servers, outputs that wait in a
queue, aborted requests. The mark is one more entry in the list of outputs, of a request that is nobody's: every release of vLLM
passes over outputs of requests that it does not know. With it go the spans of KV positions, where several versions wrote them.

V0's engine is core and front in one: there the sequences carry the record themselves.

On the outputs, ``CompletionOutput.token_weight_versions`` has one number per token of ``token_ids``, ``kv_weight_versions`` for
each the versions that wrote the KV cache it was computed from. Where vLLM itself shares cache blocks between requests
(``enable_prefix_caching`` without ``per_version``), blocks count as written by the request that reads them.

`lag` is what PipelineRL plots (arXiv 2509.19128): how many updates lie between the weights that sampled a token and the newest.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from vllm_compat.errors import InputError
from vllm_compat.weights import version as versions

_MARK = "vllm_compat weights "  # then the version, and JSON: request -> spans of its KV cache, where they changed
_HELD = "_vllm_compat_weights"  # a Record on the front's state of a request, on V0's sequence; a _Ledger on the scheduler
_BATCH = "_vllm_compat_batch_version"  # of a batch on its way: on the SchedulerOutput, on the OutputProcessor

Spans = list[list[int]]  # [first KV position, version], ascending: from that position on, that version wrote the cache


class Record:
    """What is known of one sequence: the versions of its tokens and of its KV cache, as runs. It only grows."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt  # tokens
        self.count = 0  # sampled tokens seen
        self.sent = 0  # of those, with an output that had only new ones
        self.starts: list[tuple[int, int]] = []  # (first token, version)
        self.kv: list[tuple[int, Spans]] = []  # (first token for which they hold, spans)

    def tokens(self, count: int, version: int) -> None:
        """``count`` more tokens, computed with ``version``."""
        if count > 0 and (not self.starts or self.starts[-1][1] != version):
            self.starts.append((self.count, version))
        self.count += max(count, 0)

    def cache(self, spans: Spans) -> None:
        """From the next token on, these versions wrote the KV cache."""
        self.kv.append((self.count, spans))

    def version(self, token: int) -> int:
        """Of the weights whose forward pass sampled this token."""
        return self.starts[bisect_right(self.starts, token, key=lambda run: run[0]) - 1][1]

    def cache_versions(self, token: int) -> list[int]:
        """Of the weights that wrote the KV this token was computed from, its own input's included; oldest first."""
        place = bisect_right(self.kv, token, key=lambda run: run[0]) - 1
        if place < 0:  # no update since its prompt
            return [self.starts[0][1]]
        return sorted({version for first, version in self.kv[place][1] if first < self.prompt + token})


def _span(output: Any) -> tuple[Record, range] | None:
    held = vars(output).get(_HELD)
    return None if held is None else (held[0], range(held[1], held[1] + len(output.token_ids)))


def token_weight_versions(output: Any) -> list[int] | None:
    """The weight version of each token of a CompletionOutput; None where its engine is not under vllm_compat."""
    found = _span(output)
    return None if found is None else [found[0].version(token) for token in found[1]]


def kv_weight_versions(output: Any) -> list[list[int]] | None:
    """For each token of a CompletionOutput, the versions that wrote the KV cache it was computed from, oldest first."""
    found = _span(output)
    return None if found is None else [found[0].cache_versions(token) for token in found[1]]


def lag(outputs: Any, current: int) -> list[list[int]]:
    """Per sequence, per token: ``current`` minus the weight version that the token was sampled with.

    ``outputs``: one or several `RequestOutput` or CompletionOutput. Raises InputError for outputs without versions.
    """
    found = []
    for output in outputs if isinstance(outputs, (list, tuple)) else (outputs,):
        for one in getattr(output, "outputs", (output,)):
            numbers = token_weight_versions(one)
            if numbers is None:
                raise InputError("these outputs carry no weight versions: they are not of an engine under vllm_compat")
            found.append([current - number for number in numbers])
    return found


def answered(response: Any, outputs: Any) -> Any:
    """An OpenAI response, its choices with ``token_weight_versions``. ``outputs``: the RequestOutputs that it was made of."""
    made = [one for output in outputs for one in output.outputs]
    for choice, output in zip(getattr(response, "choices", ()), made):  # an error has none
        numbers = token_weight_versions(output)
        if numbers is not None:
            choice.token_weight_versions = numbers
    return response


class _Outputs(list[Any]):
    """A RequestOutput's outputs, which tell when the turn of each has come: chunks made before (chat's role) have no tokens."""

    def __init__(self, outputs: list[Any], tell: Callable[[Any], None]) -> None:
        super().__init__(outputs)
        self._tell = tell

    def __iter__(self) -> Iterator[Any]:
        for output in super().__iter__():
            self._tell(output)
            yield output


async def streamed(results: Any, make: Callable[[Any], Any], choices: int) -> AsyncIterator[str]:
    """An OpenAI stream, each chunk that has tokens with ``token_weight_versions`` at the end of its choice.

    ``results``: the RequestOutputs, of completions each with the number of its prompt; ``make`` makes vLLM's stream of them;
    ``choices``: of one prompt. vLLM's text is kept byte for byte. Versions of tokens for which it sends no chunk (a parser holds
    them back) come with the next: all of a choice's are one number per sampled token.
    """
    fresh: dict[int, list[int]] = {}  # choice -> versions that no chunk has told

    async def watched() -> AsyncIterator[Any]:
        async for found in results:
            prompt, result = found if isinstance(found, tuple) else (0, found)

            def tell(output: Any, first: int = prompt * choices) -> None:
                fresh.setdefault(first + output.index, []).extend(token_weight_versions(output) or ())

            result.outputs = _Outputs(result.outputs, tell)
            yield found

    async with contextlib.aclosing(make(watched())) as chunks:
        async for chunk in chunks:
            yield _carrying(chunk, fresh)


_CHOICES = '"choices":['
_read_json = json.JSONDecoder().raw_decode


def _carrying(chunk: str, fresh: dict[int, list[int]]) -> str:
    """One server-sent event, with what is told of its choice. An error, the usage and the end have none."""
    start = chunk.find(_CHOICES + "{") + len(_CHOICES)  # inside a JSON text, each of its quotes would have a backslash
    if start < len(_CHOICES) or not any(fresh.values()):
        return chunk
    choice, end = _read_json(chunk, start)
    numbers = fresh.pop(choice["index"], None)
    if not numbers:
        return chunk
    return f'{chunk[: end - 1]},"token_weight_versions":{json.dumps(numbers, separators=(",", ":"))}{chunk[end - 1 :]}'


# --- V1's engine core ---------------------------------------------------------------------------------------------------


class _Ledger:
    """The version, and the requests whose KV cache is of several."""

    def __init__(self) -> None:
        self.version = 0
        self.kv: dict[str, tuple[Spans, int]] = {}  # request -> spans, and how often it had been preempted
        self.told: set[str] = set()  # requests of which the front has heard spans
        self.news: dict[int, dict[str, Spans]] = {}  # front -> request -> spans that it has not been told


def _ledger(scheduler: Any) -> _Ledger:
    found: _Ledger | None = vars(scheduler).get(_HELD)
    if found is None:
        found = vars(scheduler)[_HELD] = _Ledger()
    return found


def advance(core: Any, to: int) -> None:
    """Between two steps: the next ones compute with version ``to``."""
    ledger = _ledger(core.scheduler)
    queued = getattr(core, "batch_queue", None)  # computed with the old weights, though not read back yet
    for entry in getattr(queued, "queue", queued) or ():
        for part in entry:
            if hasattr(part, "num_scheduled_tokens"):
                vars(part).setdefault(_BATCH, ledger.version)
    ledger.told &= core.scheduler.requests.keys()
    for key, request in core.scheduler.requests.items():
        known = _known(ledger, key, request)
        spans = [span for span in known or [[0, ledger.version]] if span[0] < request.num_computed_tokens]
        if spans or key in ledger.told:  # else nothing of it is computed yet
            _tell(ledger, key, request, [*spans, [request.num_computed_tokens, to]])
    ledger.version = to


def stamp(scheduler: Any, batch: Any, outputs: Any, make: Any) -> None:
    """Mark what a step yielded. ``batch``: vLLM's SchedulerOutput; ``outputs``: its EngineCoreOutputs, from 0.9.1 one per front;
    ``make``: its EngineCoreOutput."""
    ledger = _ledger(scheduler)
    for key in list(ledger.kv):
        request = scheduler.requests.get(key)
        if request is None:
            del ledger.kv[key]
        else:
            _known(ledger, key, request)
    version = vars(batch).get(_BATCH, ledger.version)
    for front, one in outputs.items() if isinstance(outputs, dict) else ((0, outputs),):
        if one.outputs:
            news = ledger.news.pop(front, None)
            mark = f"{_MARK}{version} {json.dumps(news)}" if news else f"{_MARK}{version}"
            one.outputs.insert(0, make(request_id=mark, new_token_ids=[]))


def _known(ledger: _Ledger, key: str, request: Any) -> Spans | None:
    """The spans of a request whose cache is of several versions; preempted since, it is computed anew by the newest."""
    spans, preempted = ledger.kv.get(key, (None, 0))
    if spans is not None and (preempted < _preempted(request) or request.num_computed_tokens < spans[-1][0]):
        spans = [[0, ledger.version]]
        _tell(ledger, key, request, spans)
    return spans


def _preempted(request: Any) -> int:
    return int(getattr(request, "num_preemptions", 0))  # from 0.11.1; before, no step runs between preemption and our look


def _tell(ledger: _Ledger, key: str, request: Any, spans: Spans) -> None:
    ledger.told.add(key)
    ledger.news.setdefault(getattr(request, "client_index", 0), {})[key] = spans
    if len(spans) > 1:
        ledger.kv[key] = spans, _preempted(request)
    else:
        ledger.kv.pop(key, None)


# --- V1's front ---------------------------------------------------------------------------------------------------------


def read(processor: Any, outputs: Any) -> None:
    """A batch of EngineCoreOutput (or a further part of one) is about to become RequestOutputs."""
    states = processor.request_states
    first = outputs[0].request_id if len(outputs) else ""
    if first.startswith(_MARK):
        number, _, news = first[len(_MARK) :].partition(" ")
        vars(processor)[_BATCH] = int(number)
        for key, spans in (json.loads(news) if news else {}).items():
            if key in states:
                _record(states[key]).cache(spans)
    version = vars(processor).get(_BATCH)
    if version is None:
        return  # a scheduler of the user's own, which marks nothing
    for output in outputs:
        if output.new_token_ids and (state := states.get(output.request_id)) is not None:
            _record(state).tokens(len(output.new_token_ids), version)


def attach(state: Any, made: Any, delta: bool) -> Any:
    """The CompletionOutput that vLLM made of a request's tokens, all or (``delta``) the new ones, with their versions."""
    record: Record | None = vars(state).get(_HELD)
    if record is not None:
        vars(made)[_HELD] = record, record.sent if delta else 0
        record.sent += len(made.token_ids)
    return made


def _record(state: Any) -> Record:
    found: Record | None = vars(state).get(_HELD)
    if found is None:
        found = vars(state)[_HELD] = Record(state.prompt_len or 0)
    return found


# --- V0 -----------------------------------------------------------------------------------------------------------------


def advance_v0(engine: Any, to: int) -> None:
    """Between two steps: the next ones compute with version ``to``, which `version.current` does not say yet."""
    for scheduler in engine.scheduler:
        for group in (*scheduler.running, *scheduler.waiting, *scheduler.swapped):
            for sequence in group.get_seqs():
                record, computed = _seen_v0(sequence), sequence.data.get_num_computed_tokens()
                before = record.kv[-1][1] if record.kv else [[0, versions.current()]]
                record.cache([*(span for span in before if span[0] < computed), [computed, to]])


def preempted_v0(group: Any) -> None:
    """The cache of these sequences is thrown away, to be computed anew."""
    for sequence in group.get_seqs():
        _seen_v0(sequence).cache([[0, versions.current()]])


def attach_v0(group: Any, made: Any) -> Any:
    """The RequestOutput that V0 made of a sequence group, if it made one, with versions."""
    records = [_seen_v0(sequence) for sequence in group.get_seqs()]
    for record, output in zip(records, made.outputs if made is not None else ()):
        vars(output)[_HELD] = record, record.count - len(output.token_ids)
    return made


def _seen_v0(sequence: Any) -> Record:
    """A sequence's record, with the tokens that came since the last look."""
    record: Record | None = vars(sequence).get(_HELD)
    if record is None:
        record = vars(sequence)[_HELD] = Record(sequence.get_prompt_len())
    record.tokens(sequence.get_output_len() - record.count, versions.current())
    return record
