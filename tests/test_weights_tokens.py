"""Versions per token and of the KV cache behind it: what the core notes between steps, and what the front makes of it."""

from __future__ import annotations

import asyncio
import json
import pickle
from types import SimpleNamespace as Thing

import pytest

from vllm_compat.errors import InputError
from vllm_compat.weights import tokens


class Pair:
    """A core and its front, by what `tokens` touches of them; each step yields one token per request that has its prompt."""

    def __init__(self) -> None:
        self.scheduler = Thing(requests={})
        self.core = Thing(scheduler=self.scheduler, batch_queue=None)
        self.front = Thing(request_states={})
        self.made: dict[str, list[int]] = {}

    def add(self, name: str, prompt: int, client: int = 0) -> None:
        self.scheduler.requests[name] = Thing(num_computed_tokens=0, num_preemptions=0, client_index=client)
        self.front.request_states[name] = Thing(prompt_len=prompt)
        self.made[name] = []

    def batch(self, computed: dict[str, int]) -> Thing:
        for name, count in computed.items():
            self.scheduler.requests[name].num_computed_tokens += count
        return Thing(num_scheduled_tokens=computed)

    def result(self, batch: Thing) -> None:
        found = []
        for name in batch.num_scheduled_tokens:
            done = self.scheduler.requests[name].num_computed_tokens
            if done >= self.front.request_states[name].prompt_len + len(self.made[name]):
                self.made[name].append(0)
                found.append(Thing(request_id=name, new_token_ids=[0]))
        outputs = {0: Thing(outputs=found)}
        tokens.stamp(self.scheduler, batch, outputs, Thing)
        tokens.read(self.front, outputs[0].outputs[:1])  # AsyncLLM works through a batch in parts
        tokens.read(self.front, outputs[0].outputs[1:])

    def step(self, **computed: int) -> None:
        self.result(self.batch(computed))

    def preempt(self, name: str) -> None:
        request = self.scheduler.requests[name]
        request.num_computed_tokens, request.num_preemptions = 0, request.num_preemptions + 1

    def output(self, name: str, last: int | None = None) -> Thing:
        count = len(self.made[name]) if last is None else last
        made = Thing(token_ids=[0] * count)
        return tokens.attach(self.front.request_states[name], made, last is not None)


def versions(output: Thing) -> list[int] | None:
    return tokens.token_weight_versions(output)


def test_an_update_between_two_tokens() -> None:
    """Tokens before it have the old version, those after it the new, over KV of both; who came later knows the new alone."""
    pair = Pair()
    pair.add("a", 3)
    pair.step(a=3)
    pair.step(a=1)
    tokens.advance(pair.core, 5)
    pair.add("b", 2)
    pair.step(a=1, b=2)
    assert versions(pair.output("a")) == [0, 0, 5]
    assert tokens.kv_weight_versions(pair.output("a")) == [[0], [0], [0, 5]]
    assert versions(pair.output("b")) == [5]
    assert tokens.kv_weight_versions(pair.output("b")) == [[5]]


def test_an_update_inside_a_prompt() -> None:
    """A prompt prefilled in two chunks around an update: no token is of the old weights, their KV is."""
    pair = Pair()
    pair.add("a", 6)
    pair.add("waiting", 2)
    pair.step(a=4)
    tokens.advance(pair.core, 1)
    pair.step(a=2, waiting=2)
    assert versions(pair.output("a")) == [1]
    assert tokens.kv_weight_versions(pair.output("a")) == [[0, 1]]
    assert tokens.kv_weight_versions(pair.output("waiting")) == [[1]]


@pytest.mark.parametrize("counted", [True, False])
def test_a_preempted_request_has_new_kv(counted) -> None:
    """Its cache is thrown away and computed by the newest weights; the tokens it has keep what they were made from. Releases
    that do not count preemptions show it by the tokens computed."""
    pair = Pair()
    pair.add("a", 3)
    pair.add("b", 3)
    pair.step(a=3, b=3)
    tokens.advance(pair.core, 1)
    pair.step(a=1, b=1)
    pair.preempt("a")
    if not counted:
        for request in pair.scheduler.requests.values():
            del request.num_preemptions
    pair.step(b=1)
    pair.step(a=5, b=1)
    assert versions(pair.output("a")) == [0, 1, 1]
    assert tokens.kv_weight_versions(pair.output("a")) == [[0], [0, 1], [1]]
    assert tokens.kv_weight_versions(pair.output("b")) == [[0], [0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("meanwhile", [0, 2])
def test_preempted_across_an_update(meanwhile) -> None:
    """Preempted under one version and resumed under the next, at once or steps later: nothing of the older ones is left."""
    pair = Pair()
    pair.add("a", 3)
    pair.add("b", 3)
    pair.step(a=3, b=3)
    tokens.advance(pair.core, 1)
    pair.step(a=1, b=1)
    pair.preempt("a")
    for _ in range(meanwhile):
        pair.step(b=1)
    tokens.advance(pair.core, 2)
    pair.step(a=5, b=1)
    assert versions(pair.output("a")) == [0, 1, 2]
    assert tokens.kv_weight_versions(pair.output("a"))[-1] == [2]


def test_a_batch_in_flight_is_of_the_old_weights() -> None:
    """Scheduled and computed before the update, read back after it."""
    pair = Pair()
    pair.add("a", 3)
    pair.step(a=3)
    batch = pair.batch({"a": 1})
    pair.core.batch_queue = [("future", batch)]
    tokens.advance(pair.core, 1)
    pair.result(batch)
    pair.step(a=1)
    assert versions(pair.output("a")) == [0, 0, 1]
    assert tokens.kv_weight_versions(pair.output("a"))[-1] == [0, 1]


def test_deltas_and_pickles() -> None:
    """Outputs that have only the new tokens have only their versions, merged ones those of all; both survive a pickle."""
    pair = Pair()
    pair.add("a", 3)
    pair.step(a=3)
    first = pair.output("a", 1)
    tokens.advance(pair.core, 1)
    pair.step(a=1)
    second = pair.output("a", 1)
    assert (versions(first), versions(second)) == ([0], [1])
    first.token_ids.extend(second.token_ids)  # as vLLM merges outputs that nobody fetched in time
    assert versions(pickle.loads(pickle.dumps(first))) == [0, 1]


def test_several_fronts_are_told_about_their_own() -> None:
    """With several API servers each gets the version with its outputs, and what concerns its own requests."""
    pair = Pair()
    pair.add("a", 3, client=0)
    pair.add("b", 3, client=1)
    pair.step(a=3, b=3)
    tokens.advance(pair.core, 1)
    outputs = {i: Thing(outputs=[Thing(request_id=name, new_token_ids=[0])]) for i, name in enumerate("ab")}
    tokens.stamp(pair.scheduler, pair.batch({"a": 1, "b": 1}), outputs, Thing)
    assert [('"a"' in one.outputs[0].request_id, '"b"' in one.outputs[0].request_id) for one in outputs.values()] == [
        (True, False),
        (False, True),
    ]


def test_lag() -> None:
    """The newest version minus each token's; outputs of another engine are refused."""
    pair = Pair()
    pair.add("a", 3)
    pair.step(a=3)
    tokens.advance(pair.core, 4)
    pair.step(a=1)
    assert tokens.lag([Thing(outputs=[pair.output("a")])], 6) == [[6, 2]]
    with pytest.raises(InputError, match="carry no weight versions"):
        tokens.lag(Thing(outputs=[Thing(token_ids=[1])]), 6)


def event(choice: dict | None, **more: object) -> str:
    """A chunk as vLLM writes it."""
    body = {"id": "x", "model": 'a "choices":[{ b', "choices": [] if choice is None else [choice], **more}
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def held(index: int, versions: list[int]) -> Thing:
    """A CompletionOutput with these versions."""
    record = tokens.Record(1)
    for version in versions:
        record.tokens(1, version)
    return Thing(index=index, token_ids=[0] * len(versions), _vllm_compat_weights=(record, 0))


def streamed(made: list, choices: int = 2, numbered: bool = False) -> list[str]:
    """What a stream says of some outputs. Each item of ``made``: the outputs of a result, with the chunks that vLLM makes of
    each; chunks that are made before are ``(None, chunks)``."""

    async def results():
        for number, found in enumerate(made):
            result = Thing(outputs=[output for output, _ in found if output is not None], found=found)
            yield (number % 2, result) if numbered else result

    async def vllm(results):
        async for found in results:
            result = found[1] if numbered else found
            for chunk in (chunk for output, chunks in result.found if output is None for chunk in chunks):
                yield chunk
            chunks = [chunks for output, chunks in result.found if output is not None]
            for of, _ in zip(chunks, result.outputs, strict=True):
                for chunk in of:
                    yield chunk
        yield "data: [DONE]\n\n"

    async def all_of_it():
        return [chunk async for chunk in tokens.streamed(results(), vllm, choices)]

    return asyncio.run(all_of_it())


def told(chunks: list[str]) -> list[list[int] | None]:
    return [choice.get("token_weight_versions") for chunk in chunks[:-1] for choice in json.loads(chunk[6:]).get("choices", ())]


def test_a_stream_keeps_every_byte() -> None:
    """Without what was put into them, chunks are vLLM's text, with whatever stands in it; an error and the usage stay as they are."""
    nasty = 'é "choices":[{"index":1}] }]'
    choice = {"index": 0, "text": nasty, "logprobs": {"tokens": ["}", nasty], "deep": [{"a": [{}]}]}, "finish_reason": None}
    plain = [event(choice, usage={"n": 1}), event(None, usage={"n": 2}), 'data: {"error":{"message":"x"}}\n\n']
    found = streamed([[(held(0, [3, 4]), plain)]])
    assert [chunk.replace(',"token_weight_versions":[3,4]', "") for chunk in found[:-1]] == plain
    assert found[0] != plain[0]
    assert json.loads(found[0][6:])["choices"][0] == {**choice, "token_weight_versions": [3, 4]}
    assert found[1:] == [*plain[1:], "data: [DONE]\n\n"]


def test_a_stream_of_several_choices() -> None:
    """Of several samples and prompts, each chunk has its own; chat's first chunk, which is made before any token, has none."""
    role = event({"index": 0, "delta": {"role": "assistant"}})
    first = [(None, [role]), (held(0, [1]), [event({"index": 0})]), (held(1, [2]), [event({"index": 1})])]
    assert told(streamed([first])) == [None, [1], [2]]
    of_prompts = [[(held(1, [1]), [event({"index": 1})])], [(held(1, [2, 2]), [event({"index": 3})])]]
    assert told(streamed(of_prompts, numbered=True)) == [[1], [2, 2]]


def test_a_stream_that_holds_tokens_back() -> None:
    """A parser may send no chunk for some tokens: their versions come with the next chunk of that choice."""
    waits = [[(held(0, [1]), [])], [(held(1, [5]), [event({"index": 1})])], [(held(0, [2, 2]), [event({"index": 0})])]]
    assert told(streamed(waits)) == [[5], [1, 2, 2]]
    nothing = [[(Thing(index=0, token_ids=[0]), [event({"index": 0})])]]  # an engine that is not under vllm_compat
    assert told(streamed(nothing)) == [None]
