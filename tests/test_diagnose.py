"""`diagnose` names a fault that was put in, on the side it was put, with its share; what it does not know is unexplained."""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_model import make
from safetensors.torch import load_file, save_file
from support import PARITY
from transformers import AutoModelForCausalLM

from vllm_compat import diagnose, rollouts, v0_formula
from vllm_compat.cli import main
from vllm_compat.errors import InputError
from vllm_compat.trainer import fp32_lm_head
from vllm_compat.v0_formula import Setting

MODEL = PARITY / "model"
TEMPERED = {"temperature": 0.7}
TRUNCATED = {"temperature": 0.7, "top_p": 0.9}
PENALIZED = {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.4}
MIN_P = {"temperature": 1.4, "top_p": 0.7, "min_p": 0.05}
GREEDY = {"temperature": 0.0}
# Some are given to sequence i, so that a fault of one kind of row is among others that have none.
MIXED = (TRUNCATED, GREEDY, PENALIZED)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are tiny: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def model(folder: Path = MODEL, dtype: str = "float32", head: str = "float32") -> torch.nn.Module:
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if dtype != "float32" and head == "float32":
        fp32_lm_head(found)
    return found


def setting(params: dict) -> Setting:
    return Setting(**{key: value for key, value in params.items() if key != "seed"})


def distribution(logits: torch.Tensor, params: dict, prompt: list, tokens: list) -> torch.Tensor:
    return v0_formula.processed_logprobs(logits.float(), setting(params), prompt, tokens)


def logits_of(row: dict, of: torch.nn.Module) -> torch.Tensor:
    """Logits [tokens, vocab], one sequence by itself."""
    ids = torch.tensor([row["prompt_ids"] + row["token_ids"][:-1]])
    with torch.inference_mode():
        return of(ids).logits[0, len(row["prompt_ids"]) - 1 :].float()


def scored(row: dict, of: torch.nn.Module, params: dict | None = None) -> list[float]:
    """The specification's logprobs of the row's tokens, under its own parameters or others."""
    return [float(found[token]) for found, token in zip(distributions(row, of, params), row["token_ids"])]


def distributions(row: dict, of: torch.nn.Module, params: dict | None = None) -> list[torch.Tensor]:
    given = row["sampling_params"] if params is None else params
    return [distribution(line, given, row["prompt_ids"], row["token_ids"][:step]) for step, line in enumerate(logits_of(row, of))]


@functools.cache
def _sampled(params: str, dtype: str, prompt_length: int, count: int, steps: int) -> str:
    of, kinds, random = model(dtype=dtype), json.loads(params), torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        prompt = torch.randint(1, 256, (prompt_length + i % 4,), generator=random).tolist()
        row = {"prompt_ids": prompt, "token_ids": [], "sampling_params": kinds[i % len(kinds)]}
        for _ in range(steps):
            with torch.inference_mode():
                line = of(torch.tensor([prompt + row["token_ids"]])).logits[0, -1].float()
            found = distribution(line, row["sampling_params"], prompt, row["token_ids"])
            greedy = row["sampling_params"].get("temperature") == 0
            row["token_ids"].append(int(found.argmax() if greedy else torch.multinomial(found.exp(), 1, generator=random)))
        rows.append(row)
    return json.dumps(rows)


def sample(*kinds: dict, dtype: str = "float32", prompt_length: int = 6, count: int = 12, steps: int = 16) -> list[dict]:
    """Sequences drawn from the specification; both sides have the right logprobs."""
    rows = json.loads(_sampled(json.dumps(kinds), dtype, prompt_length, count, steps))
    for row in rows:
        row["rollout_logprobs"] = scored(row, model(dtype=dtype))
        row["trainer_logprobs"] = list(row["rollout_logprobs"])
    return rows


def run(rows: list[dict], models: dict[int, Path] | None = None, **more: object) -> diagnose.Diagnosis:
    read = [rollouts.rollout(row, f"row {i}") for i, row in enumerate(rows)]
    found = diagnose.diagnose(read, models or {0: MODEL}, **{"dtype": "float32", **more})
    # What holds for every diagnosis: shares are a whole, and nobody is named for nothing.
    assert math.isclose(sum(f.share for f in found.findings), 1.0, rel_tol=1e-6)
    assert all(f.evidence and f.change for f in found.findings)
    assert found.named <= set(diagnose.CAUSES)
    assert json.loads(json.dumps(found.to_dict()))["healthy"] == found.healthy
    assert "healthy" in diagnose.text(found)
    return found


def share(found: diagnose.Diagnosis, cause: str, side: str) -> float:
    return sum(f.share for f in found.findings if (f.cause, f.side) == (cause, side))


def put(rows: list[dict], side: str, make_logprobs: Callable[[dict], list[float]]) -> list[dict]:
    """The rows with another side: only the fault that is put in."""
    return [{**row, f"{side}_logprobs": make_logprobs(row)} for row in rows]


SIDES = pytest.mark.parametrize("side", ["trainer", "rollout"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_healthy_pair(dtype):
    """Rows of all kinds, both sides right, the trainer's arithmetic its own: nothing is named."""
    rows = sample(*MIXED, MIN_P, dtype=dtype)
    found = run(rows, dtype=dtype)
    assert found.healthy
    assert found.named == set()
    assert {f.cause for f in found.findings} == {"rounding"}
    assert found.heads == {"trainer": "float32", "rollout": "float32"}


def outside(row: dict, rank: int = 0) -> dict:
    """The row, its last token one that the trainer's truncation does not keep and the rollout's did; rank 0: the most probable."""
    *_, last = distributions(row, model(dtype="bfloat16"))
    full = logits_of(row, model(dtype="bfloat16"))[-1]
    token = int(torch.where(last.isneginf(), full, -math.inf).argsort(descending=True)[rank])
    tokens = [*row["token_ids"][:-1], token]
    sides = {
        "rollout_logprobs": [*row["rollout_logprobs"][:-1], -2.5],
        "trainer_logprobs": [*row["trainer_logprobs"][:-1], -math.inf],
    }
    return {**row, **sides, "token_ids": tokens}


def test_rounding_moves_a_token_across_the_edge_of_a_truncation():
    """bfloat16: one token that top-p keeps on one side only is rounding; one in each sequence, far from the edge, is not."""
    sampled = sample(TRUNCATED, dtype="bfloat16", count=24)
    rows = [row for row in sampled if all(map(math.isfinite, scored(row, model())))]  # none of the trainer's own tokens crossed
    one = run([outside(rows[0], rank=3), *rows[1:]], dtype="bfloat16")
    assert one.healthy
    assert one.metrics["outside_trainer"] == 1
    many = run([outside(row, rank=20) for row in rows], dtype="bfloat16")
    assert not many.healthy
    assert share(many, "unexplained", "rollout") > 0.02


FAULTS = {
    "raw_logprobs": (MIXED, lambda p: {}),
    "temperature_never": ((TRUNCATED, PENALIZED), lambda p: {**p, "temperature": 1.0}),
    "temperature_twice": ((TRUNCATED, PENALIZED), lambda p: {**p, "temperature": p["temperature"] ** 2}),
    "penalties_ignored": (MIXED, lambda p: {k: v for k, v in p.items() if "penalty" not in k}),
    "truncation_not_renormalized": ((TRUNCATED, MIN_P), lambda p: {k: v for k, v in p.items() if k not in ("top_p", "min_p")}),
}


@SIDES
@pytest.mark.parametrize("fault", FAULTS)
def test_each_semantic_fault_alone(fault, side):
    """One fault on one side: that one is named, on that side, and explains the gap."""
    kinds, wrong = FAULTS[fault]
    found = run(put(sample(*kinds), side, lambda row: scored(row, model(), wrong(row["sampling_params"]))))
    assert found.named == {fault}
    assert share(found, fault, side) > 0.99
    assert not found.healthy


def negated(row: dict) -> list[float]:
    if row["sampling_params"] != GREEDY:
        return row["rollout_logprobs"]
    return [float((-line).log_softmax(-1)[t]) for line, t in zip(logits_of(row, model()), row["token_ids"])]


def one_hot(row: dict) -> list[float]:
    return scored(row, model(), {"temperature": 1e-2}) if row["sampling_params"] == GREEDY else row["rollout_logprobs"]


@SIDES
@pytest.mark.parametrize(("fault", "wrong"), [("greedy_negated", negated), ("greedy_one_hot", one_hot)])
def test_greedy_rows(fault, wrong, side):
    """A fault of greedy rows is named where only some rows are greedy."""
    found = run(put(sample(*MIXED), side, wrong))
    assert found.named == {fault}
    assert share(found, fault, side) > 0.99


@SIDES
def test_v1_order_of_filters(side):
    """min-p in front of top-p, as V1 has it, is told from V0's order by what it keeps and by its sum."""

    def min_p_first(row):
        found = []
        for line, token in zip(logits_of(row, model()), row["token_ids"]):
            kept = distribution(line, {"temperature": 1.4, "min_p": 0.05}, [], [])
            found.append(float(distribution(kept, {"top_p": 0.7}, [], [])[token]))
        return found

    rows = put(sample(MIN_P), side, min_p_first)
    assert any(row["rollout_logprobs"] != row["trainer_logprobs"] for row in rows)
    found = run(rows)
    assert found.named == {"min_p_first"}
    assert share(found, "min_p_first", side) > 0.99


def test_two_faults_at_once():
    """On two sides, and on one: both are named, each with a share."""
    rows = put(sample(TRUNCATED), "rollout", lambda row: scored(row, model(), {}))
    rows = put(rows, "trainer", lambda row: scored(row, model(), {**TRUNCATED, "temperature": 0.49}))
    found = run(rows)
    assert found.named == {"raw_logprobs", "temperature_twice"}
    assert share(found, "raw_logprobs", "rollout") + share(found, "temperature_twice", "trainer") > 0.99
    found = run(put(sample(TRUNCATED), "trainer", lambda row: scored(row, model(), {"temperature": 0.49})))
    assert found.named == {"truncation_not_renormalized", "temperature_twice"}
    assert min(share(found, name, "trainer") for name in found.named) > 0.05


def test_the_same_fault_on_both_sides():
    """Raw on both sides leaves no mismatch and is named all the same, with a note."""
    rows = sample(TRUNCATED)
    for side in ("trainer", "rollout"):
        rows = put(rows, side, lambda row: scored(row, model(), {}))
    found = run(rows)
    assert found.parts["difference"] == 0
    assert found.named == {"raw_logprobs"}
    assert share(found, "raw_logprobs", "trainer") == pytest.approx(0.5, abs=0.01)
    assert "cancel" in found.notes[0]


def rounded_head(row: dict) -> list[float]:
    return scored(row, model(dtype="bfloat16", head="model"))


@SIDES
def test_a_float32_head_on_one_side_only(side):
    """Seen in the fit where the arithmetic is the model's own, and refused as healthy."""
    found = run(put(sample(TEMPERED, dtype="bfloat16"), side, rounded_head), dtype="bfloat16")
    assert found.named == {"one_sided_head"}
    assert found.heads[side] == "rounded"
    assert share(found, "one_sided_head", side) > 0.9
    assert not found.healthy


def noisy(rows: list[dict], side: str, size: float) -> list[dict]:
    random = np.random.default_rng(5)
    return put(rows, side, lambda row: [min(v + size * random.normal(), 0.0) for v in row[f"{side}_logprobs"]])


def with_top(rows: list[dict], field: str, head: str) -> list[dict]:
    """Five most probable tokens of each row, rounded to float32 as an engine returns them."""
    of, found = model(dtype="bfloat16", head=head), []
    for row in rows:
        tops = [line.float().topk(5) for line in distributions(row, of)]
        found.append({**row, field: [[[int(t), float(v)] for v, t in zip(top.values, top.indices)] for top in tops]})
    return found


@pytest.mark.parametrize("kind", [TEMPERED, TRUNCATED, GREEDY], ids=str)
def test_top_logprobs_tell_the_head_that_noise_hides(kind):
    """Under noise that hides it, a rounded head shows in the top-n: differences lie on bfloat16's grid. It is named."""
    rows = sample(kind, dtype="bfloat16")
    for head, name in (("model", "rounded"), ("float32", "float32")):
        hidden = noisy(put(rows, "rollout", rounded_head) if head == "model" else rows, "rollout", 0.03)
        found = run(with_top(hidden, "top_logprobs", head), dtype="bfloat16")
        assert found.heads == {"trainer": "float32", "rollout": name}
        assert found.named == ({"one_sided_head"} if head == "model" else set())
        blind = run(hidden, dtype="bfloat16")
        assert blind.heads["rollout"] == "unknown"
        assert blind.healthy
        assert "--rollout-head" in blind.notes[-1]


def test_what_is_said_of_a_head():
    """Where the data do not tell, the word of the user counts; where they do, they win."""
    rows = noisy(sample(TEMPERED, dtype="bfloat16"), "rollout", 0.03)
    found = run(rows, dtype="bfloat16", heads={"rollout": "rounded", "trainer": "rounded"})
    assert found.heads == {"trainer": "float32", "rollout": "rounded"}
    assert found.named == {"one_sided_head"}


@SIDES
def test_logprobs_rounded_to_bfloat16(side):
    """log_softmax in bfloat16: every value is a 16-bit number, which is named beside nothing else."""
    rows = put(sample(TRUNCATED), side, lambda row: torch.tensor(row["rollout_logprobs"]).bfloat16().double().tolist())
    found = run(rows)
    assert found.named == {"bfloat16_logprobs"}
    assert share(found, "bfloat16_logprobs", side) > 0.95


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> dict[int, Path]:
    """Three versions of the weights; every parameter differs a little."""
    place, found = tmp_path_factory.mktemp("versions"), {0: MODEL}
    for version in (1, 2):
        found[version] = place / str(version)
        shutil.copytree(MODEL, found[version])
        weights, random = load_file(MODEL / "model.safetensors"), torch.Generator().manual_seed(version)
        for name, value in weights.items():
            weights[name] = value * (1 + 0.05 * version * torch.randn(value.shape, generator=random)).to(value.dtype)
        save_file(weights, found[version] / "model.safetensors", metadata={"format": "pt"})
    return found


def claim(rows: list[dict], rollout: object, trainer: int) -> list[dict]:
    return [{**row, "rollout_version": rollout, "trainer_version": trainer} for row in rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_lag_is_not_a_fault(versions, dtype):
    """Two versions that the rows name: the objective's share, and healthy."""
    rows = put(sample(TRUNCATED, dtype=dtype), "trainer", lambda row: scored(row, model(versions[1], dtype)))
    found = run(claim(rows, 0, 1), versions, dtype=dtype)
    assert found.healthy
    assert share(found, "policy_lag", "both") > 0.8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@SIDES
def test_stale_weights(versions, side, dtype):
    """Half of the sequences from weights two updates behind: named, with how many."""
    rows = claim(put(sample(TEMPERED, dtype=dtype), "trainer", lambda row: scored(row, model(versions[2], dtype))), 2, 2)
    rows = put(rows, "rollout", lambda row: row["trainer_logprobs"])
    for row in rows[::2]:
        row[f"{side}_logprobs"] = scored(row, model(dtype=dtype))
    found = run(rows, versions, dtype=dtype)
    assert found.named == {"stale_weights"}
    assert share(found, "stale_weights", side) > (0.99 if dtype == "float32" else 0.8)
    assert "6 of 12 sequences: 2 updates behind (6)" in next(f.evidence for f in found.findings if f.cause == "stale_weights")


def replayed(row: dict, plan: list[tuple[torch.nn.Module, int]]) -> list[float]:
    """Token by token over one KV cache: each model from its position on."""
    ids, cache, lines = row["prompt_ids"] + row["token_ids"][:-1], None, []
    with torch.inference_mode():
        for at, token in enumerate(ids):
            of = [m for m, start in plan if start <= at][-1]
            out = of(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            lines.append(out.logits[0, -1])
    lines = lines[len(row["prompt_ids"]) - 1 :]
    given, prompt = row["sampling_params"], row["prompt_ids"]
    return [float(distribution(line, given, prompt, row["token_ids"][:i])[row["token_ids"][i]]) for i, line in enumerate(lines)]


def test_an_update_inside_requests(versions):
    """Versions by token are followed over the KV cache; where the rows hide them, the update is found and named."""
    rows, at = sample(TEMPERED), 7
    rows = put(rows, "rollout", lambda row: replayed(row, [(model(), 0), (model(versions[1]), len(row["prompt_ids"]) - 1 + at)]))
    rows = put(rows, "trainer", lambda row: scored(row, model(versions[1])))
    told = run(claim(rows, [0] * at + [1] * (16 - at), 1), versions)
    assert told.healthy
    assert share(told, "policy_lag", "both") > 0.99
    hidden = run(claim(rows, 1, 1), versions)
    assert hidden.named == {"unreported_update"}
    assert share(hidden, "unreported_update", "rollout") > 0.99


def test_a_stale_prefix_cache(versions):
    """Prompts whose whole blocks of 16 or 32 tokens older weights wrote; the rest is computed with the named ones."""
    rows = sample(TEMPERED, prompt_length=40, count=6)
    rows = put(rows, "trainer", lambda row: scored(row, model(versions[1])))
    rows = put(rows, "rollout", lambda row: replayed(row, [(model(), 0), (model(versions[1]), 32)]))
    found = run(claim(rows, 1, 1), versions)
    assert found.named == {"stale_prefix_cache"}
    assert share(found, "stale_prefix_cache", "rollout") > 0.99


@pytest.mark.parametrize("part", ["the first half", "the norms only"])
def test_part_of_an_update(versions, part):
    """Some parameters new and some old, for all tokens: named, with which."""
    mixed, new = copy.deepcopy(model()), dict(model(versions[1]).named_parameters())
    names = list(new)
    wanted = names[: (len(names) + 1) // 2] if part == "the first half" else [name for name in names if "norm" in name]
    with torch.no_grad():
        for name, value in mixed.named_parameters():
            if name in wanted:
                value.copy_(new[name])
    rows = put(sample(TEMPERED, count=4), "trainer", lambda row: scored(row, model(versions[1])))
    found = run(claim(put(rows, "rollout", lambda row: scored(row, mixed)), 1, 1), versions)
    assert found.named == {"mixed_weights"}
    assert part in found.findings[0].evidence
    assert found.findings[0].share > 0.99


@SIDES
@pytest.mark.parametrize("kind", ["noise", "another model", "another rope"])
def test_unseen_faults_are_unexplained(kind, side, versions, tmp_path):
    """Noise, foreign weights, a wrong RoPE base: nobody is blamed, and the share says how much is not understood."""
    rows = claim(sample(TRUNCATED), 2, 2)
    right = [scored(row, model(versions[2])) for row in rows]
    rows = [{**row, "rollout_logprobs": values, "trainer_logprobs": values} for row, values in zip(rows, right)]
    if kind == "noise":
        rows = noisy(rows, side, 0.5)
    else:
        folder = make(tmp_path / "other", seed=9)
        if kind == "another rope":
            shutil.copy(versions[2] / "model.safetensors", folder / "model.safetensors")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 50.0}))
        rows = put(rows, side, lambda row: scored(row, model(folder)))
    found = run(rows, versions)
    assert found.named == set()
    assert share(found, "unexplained", side) > 0.95
    assert not found.healthy


def test_an_unseen_fault_beside_a_known_one():
    """A wrong token here and there beside raw logprobs: raw is named, and the rest is the share that was put in."""
    rows = put(sample(TRUNCATED), "rollout", lambda row: scored(row, model(), {}))
    known = sum(abs(a - b) for row in rows for a, b in zip(row["rollout_logprobs"], row["trainer_logprobs"]))
    for row in rows:
        row["rollout_logprobs"][3] -= 0.7
    whole = sum(abs(a - b) for row in rows for a, b in zip(row["rollout_logprobs"], row["trainer_logprobs"]))
    found = run(rows)
    assert found.named == {"raw_logprobs"}
    assert share(found, "unexplained", "rollout") == pytest.approx(0.7 * len(rows) / whole, abs=0.02)
    assert share(found, "raw_logprobs", "rollout") == pytest.approx((whole - 0.7 * len(rows)) / whole, abs=0.02)
    assert known > 0
    assert "token 3" in next(f.evidence for f in found.findings if f.cause == "unexplained")


def test_masked_tokens_and_minus_infinity():
    """Tokens of another origin count as context only; a token that a side removed is counted and noted."""
    rows = sample(TEMPERED)
    for row in rows:
        row["mask"] = [0 if 4 <= i < 7 else 1 for i in range(16)]
        row["rollout_logprobs"] = [v if keep else None for v, keep in zip(row["rollout_logprobs"], row["mask"])]
    found = run(rows)
    assert found.healthy
    assert found.metrics["tokens"] == 12 * 13
    rows[0]["trainer_logprobs"][0] = -math.inf
    found = run(rows)
    assert "1 tokens have a logprob of -inf on the side of the trainer" in found.notes
    assert share(found, "unexplained", "trainer") > 0.9


def test_engines_that_draw_the_same_samples():
    """Equal completions of different engines are named; of one engine, of greedy or of seeded requests they are not."""
    rows = sample(TEMPERED)
    for kind, named in (({}, {"shared_seed"}), (GREEDY, set()), ({"seed": 3}, set())):
        params = {**TEMPERED, **kind}
        both = [{**row, "sampling_params": params, "engine": name} for name in "ab" for row in rows]
        for row in both:
            row["rollout_logprobs"] = row["trainer_logprobs"] = scored(row, model())
        assert run(both).named == named
        assert run([{**row, "engine": "a"} for row in both]).named == set()


GOOD = {
    "prompt_ids": [5, 6], "token_ids": [7, 8], "rollout_logprobs": [-1.0, -2.0], "trainer_logprobs": [-1.0, -2.0],
    "sampling_params": {"temperature": 0.7},
}  # fmt: skip
BAD = {
    "prompt_ids is missing: want a list": {"prompt_ids": None},
    "prompt_ids is empty": {"prompt_ids": []},
    "token_ids holds something that is no token id": {"token_ids": [7, "x"]},
    "rollout_logprobs has 1 values, token_ids 2": {"rollout_logprobs": [-1.0]},
    "trainer_logprobs at token 1 is 0.4, above 0": {"trainer_logprobs": [-1.0, 0.4]},
    "trainer_logprobs at token 0 is nan": {"trainer_logprobs": [math.nan, -1.0]},
    "trainer_logprobs at token 0 is missing": {"trainer_logprobs": [None, -1.0]},
    "mask holds something other than 0 and 1": {"mask": [1, 2]},
    "sampling_params is missing": {"sampling_params": None},
    "sampling_params is text, but no JSON": {"sampling_params": "T=1"},
    "sampling_params: no sampling parameter of vLLM: heat": {"sampling_params": {"heat": 1}},
    "sampling_params: bad_words: changes the distribution": {"sampling_params": {"bad_words": ["a"]}},
    "rollout_version want an int": {"rollout_version": [1, "2"]},
    "trainer_version is a str": {"trainer_version": "7"},
    "names weights of version 9, where --model gives 0": {"trainer_version": 9},
    "holds a token id that the model does not have": {"token_ids": [7, 900]},
    "top_logprobs at token 0: want": {"top_logprobs": [[1], []]},
    "top_logprobs at token 1 is 2, above 0": {"top_logprobs": [[], [[3, 2.0]]]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows(message, tmp_path, capsys):
    """File, line, field and what is wanted; exit code 2."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, **BAD[message]}) + "\n")
    assert main(["diagnose", str(file), "--model", str(MODEL)]) == 2
    error = capsys.readouterr().err
    assert f"{file} line 3" in error
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no row"), ("{", "line 1: no JSON"), ("[1]", "line 1: is a list"), (json.dumps({**GOOD, "mask": [0, 0]}), "no token")],
)
def test_bad_files(text, message, tmp_path, capsys):
    """Empty files, text that is no JSON, and rows without a token to compare."""
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    assert main(["diagnose", str(file), "--model", str(MODEL)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere"], "/nowhere is no model folder"),
        (["--model", str(MODEL), "--model", f"1={MODEL}"], "of several models each needs its version"),
        (["--model", f"1={MODEL}", "--model", f"1={MODEL}"], "version 1 is given twice"),
        (["--model", str(MODEL), "--sampling-params", "{"], "--sampling-params: no JSON"),
        (["--model", str(MODEL), "--sampling-params", "3"], "--sampling-params: want a JSON object"),
        (["--model", str(MODEL), "--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    """What is wrong with the command line, in one sentence."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD))
    assert main(["diagnose", str(file), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "feather", "arrow", "stream.arrow"])
def test_the_command_and_its_formats(kind, tmp_path, capsys):
    """Every format gives the same diagnosis, as text and as JSON; 1 for a fault, 0 for none; parameters given once."""
    rows = put(sample(TRUNCATED, count=4), "trainer", lambda row: scored(row, model(), {}))
    rows = [{k: v for k, v in row.items() if k != "sampling_params"} for row in with_top(rows, "top_logprobs", "float32")]
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write(rows, file)
    command = ["diagnose", str(file), "--model", str(MODEL), "--dtype", "float32", "--sampling-params", json.dumps(TRUNCATED)]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "raw_logprobs  (semantic; trainer)" in out
    assert "scoring" in err
    assert main([*command, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["findings"][0]["cause"] == "raw_logprobs"
    assert data["metrics"]["tokens"] == 64
    right = [{**row, "trainer_logprobs": row["rollout_logprobs"]} for row in rows]
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in right))
    assert main(["diagnose", str(good), *command[2:]]) == 0


def write(rows: list[dict], file: Path) -> None:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(
        [{**row, "top_logprobs": [[[float(t), v] for t, v in top] for top in row["top_logprobs"]]} for row in rows]
    )
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif file.suffix == ".feather":
        pyarrow.feather.write_feather(table, file)
    else:
        make_writer = pyarrow.ipc.new_stream if "stream" in file.name else pyarrow.ipc.new_file
        with make_writer(str(file), table.schema) as writer:
            writer.write_table(table)


def test_files_that_are_not_what_they_are_called(tmp_path, capsys, monkeypatch):
    """Damaged Parquet, and Parquet without pyarrow: an error that says what to do."""
    file = tmp_path / "rows.parquet"
    file.write_text("no parquet")
    assert main(["diagnose", str(file), "--model", str(MODEL)]) == 2
    assert "not a .parquet file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        rollouts.read([file])
    with pytest.raises(InputError, match="no such file"):
        rollouts.read([tmp_path / "nothing.jsonl"])


def test_every_cause_is_documented():
    """docs/diagnose.md has a row for each cause, with its layer."""
    text = (Path(__file__).parents[1] / "docs" / "diagnose.md").read_text()
    for name, cause in diagnose.CAUSES.items():
        assert f"| `{name}` | {cause.layer} |" in text


def test_faults_do_not_move_when_rows_do():
    """The order of the rows changes no share."""
    rows = put(sample(*MIXED), "rollout", lambda row: scored(row, model(), {}))
    one, two = run(rows), run(rows[::-1])
    assert [replace(f, share=round(f.share, 4), nats=round(f.nats, 4), evidence="") for f in one.findings] == [
        replace(f, share=round(f.share, 4), nats=round(f.nats, 4), evidence="") for f in two.findings
    ]
