"""Weights from files: what is checked before the model changes, what a failure leaves, and what a fingerprint sees."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_compat import proof
from vllm_compat.errors import WeightUpdateError
from vllm_compat.weights import manifest, worker
from vllm_compat.weights.transports import files, open_source
from vllm_compat.weights.update import weight_update

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.arange(7).to(torch.bfloat16),
    "c.weight": torch.tensor(3.5),
    "d.scale": torch.arange(5, dtype=torch.int32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards and its index, beside a file that the index does not name."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": ["a.weight", "b.weight"],
        "model-00002-of-00002.safetensors": ["c.weight", "d.scale"],
    }
    for name, names in shards.items():
        save_file({key: TENSORS[key] for key in names}, made / name)
    save_file({"stray": torch.zeros(1)}, made / "consolidated.safetensors")
    index = {key: name for name, names in shards.items() for key in names}
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return made


def source(path: Path) -> dict[str, Any]:
    return {"transport": "files", "path": str(path)}


# --- files --------------------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint(folder) -> None:
    """The manifest before any tensor is read, every tensor bit for bit, again and again; strays aside."""
    incoming = open_source(source(folder), "cpu", 1.0)
    assert incoming.rereadable
    words = {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in TENSORS.items()}
    assert incoming.manifest == words
    for _ in range(2):
        found = dict(incoming.tensors())
        assert set(found) == set(TENSORS)
        assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_a_file_cut_anywhere(tmp_path) -> None:
    """Whatever length is left of a file, it is refused by name when it is opened."""
    whole = tmp_path / "whole.safetensors"
    save_file(TENSORS, whole)
    data = whole.read_bytes()
    for length in (0, 1, 7, 8, 9, 60, len(data) // 2, len(data) - 1):
        cut = tmp_path / f"cut{length}.safetensors"
        cut.write_bytes(data[:length])
        with pytest.raises(WeightUpdateError, match=rf"cut{length}\.safetensors is damaged or not whole"):
            files.Files(cut)


def test_folders_that_are_no_checkpoint(folder, tmp_path) -> None:
    """Each is refused, and what is wrong has a name."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightUpdateError, match="holds no safetensors file"):
        files.Files(empty)
    (empty / "model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(WeightUpdateError, match="only safetensors files are read"):
        files.Files(empty / "model.bin")
    with pytest.raises(WeightUpdateError, match="no such file or folder"):
        files.Files(tmp_path / "nothing")
    for text in ("{", "[]", '{"weight_map": []}', "{}"):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(WeightUpdateError, match=r"index\.json cannot be read"):
            files.Files(folder)
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "twice.safetensors")
    with pytest.raises(WeightUpdateError, match=r"a\.weight is in .*twice\.safetensors and in another file"):
        files.Files(folder)


def test_a_missing_shard(folder) -> None:
    """A shard that the index names and the folder lacks."""
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightUpdateError, match=r"lacks the shard model-00002-of-00002\.safetensors"):
        files.Files(folder)


@pytest.mark.parametrize("given", [{}, {"path": None}, {"path": ["x"]}])
def test_a_source_without_a_path(given) -> None:
    """Said so, not as a KeyError."""
    with pytest.raises(WeightUpdateError, match="is not a source of files"):
        open_source({"transport": "files", **given}, "cpu", 1.0)


@pytest.mark.parametrize("how", ["in place", "renamed over", "removed"])
def test_a_file_that_changes_after_it_was_opened(tmp_path, how) -> None:
    """A trainer that writes its next weights to the same path does not get half of each in."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    opened = files.Files(path)
    dict(opened.tensors())
    if how == "in place":
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        os.utime(path, ns=(1, 1))
    elif how == "renamed over":
        save_file(TENSORS, tmp_path / "next")
        (tmp_path / "next").rename(path)
    else:
        path.unlink()
    with pytest.raises(WeightUpdateError, match=r"model\.safetensors was changed after it was opened"):
        dict(opened.tensors())


# --- manifests ----------------------------------------------------------------------------------------------------------

WANTED: manifest.Manifest = {"embed": ((8, 4), "bfloat16"), "norm": ((4,), "float32"), "table": ((4,), "int32")}


def changed(**more: Any) -> manifest.Manifest:
    return {name: value for name, value in {**WANTED, **more}.items() if value is not None}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (changed(extra=((1,), "float32")), "the model has no tensor extra"),
        (changed(norm=None), "the update lacks norm of 3 tensors"),
        (changed(norm=((5,), "float32")), r"norm has shape \[5\], the model's \[4\]"),
        (changed(norm=((4, 1), "float32")), r"norm has shape \[4, 1\]"),
        (changed(norm=((4,), "int8")), "norm is int8, the model's float32"),
        (changed(norm=((4,), "float8_e4m3fn")), "norm is float8_e4m3fn, the model's float32"),
        (changed(table=((4,), "int64")), "table is int64, the model's int32"),
        (changed(table=((4,), "float32")), "table is float32, the model's int32"),
        (changed(**{"lm_head.weight": ((8, 4), "bfloat16")}), r"the model has no tensor lm_head\.weight"),
    ],
)
def test_refused(given, words) -> None:
    """Each is refused by the tensor's name, partial or not (but for what is missing)."""
    with pytest.raises(WeightUpdateError, match=words):
        manifest.check(WANTED, given, tied=False, partial=False)
    if "lacks" in words:
        manifest.check(WANTED, given, tied=False, partial=True)
    else:
        with pytest.raises(WeightUpdateError, match=words):
            manifest.check(WANTED, given, tied=False, partial=True)


def test_no_false_alarms() -> None:
    """Float kinds are cast, a tied head and rotary frequencies may be named or not."""
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        manifest.check(WANTED, changed(norm=((4,), dtype), embed=((8, 4), dtype)), tied=False, partial=False)
    head = {"lm_head.weight": ((8, 4), "bfloat16")}
    frequencies = {"layers.0.rotary_emb.inv_freq": ((2,), "float32")}
    for more in (head, frequencies, {**head, **frequencies}):
        manifest.check(WANTED, {**WANTED, **more}, tied=True, partial=False)
        manifest.check({**WANTED, **more}, WANTED, tied=True, partial=False)
    with pytest.raises(WeightUpdateError, match="no tensors"):
        manifest.check(WANTED, {}, tied=False, partial=True)


def config_of(name: str, **more: Any) -> Any:
    from transformers import LlamaConfig

    llama = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **more
    )  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(model=name, revision=None, hf_config=llama),
        vllm_config=SimpleNamespace(load_config=SimpleNamespace(download_dir=None)),
    )


@pytest.mark.parametrize("ties", [True, False])
def test_expected_of_a_config_alone(tmp_path, ties) -> None:
    """Where an engine was started without weights: the names that transformers would save, and what it saves passes."""
    from transformers import LlamaForCausalLM

    made = config_of("no/where", tie_word_embeddings=ties)
    wanted = manifest.expected(made, None)
    LlamaForCausalLM(made.model_config.hf_config).save_pretrained(tmp_path)
    given = files.Files(tmp_path).manifest
    assert ("lm_head.weight" in given) is not ties
    assert manifest.tied(made) is ties
    manifest.check(wanted, given, manifest.tied(made), partial=False)
    given.pop("model.norm.weight")
    with pytest.raises(WeightUpdateError, match=r"the update lacks model\.norm\.weight of"):
        manifest.check(wanted, given, manifest.tied(made), partial=False)


def test_expected_of_neither() -> None:
    """No safetensors, and no model of transformers': an update cannot be checked, so it is refused."""
    made = config_of("no/where")
    made.model_config.hf_config = SimpleNamespace(model_type="unheard of")
    with pytest.raises(WeightUpdateError, match="which tensors no/where has cannot be told"):
        manifest.expected(made, None)


def test_the_folder_of_a_hub_name(folder, tmp_path) -> None:
    """A model that was downloaded by name: its checkpoint is found, so that its own tensor names count."""
    cache = tmp_path / "cache"
    commit = cache / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, commit)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("0" * 40)
    made = config_of("some/model")
    made.vllm_config.load_config.download_dir = str(cache)
    assert manifest.folder(made) == commit
    assert set(manifest.expected(made, manifest.folder(made))) == set(TENSORS)
    made.model_config.model = "some/other"
    assert manifest.folder(made) is None
    made.model_config.model = str(folder)
    assert manifest.folder(made) == folder


# --- a worker -----------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Plain parameters, a buffer and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stops_at = -1
        for name, value in old_weights().items():
            self.register_parameter(name, torch.nn.Parameter(value.clone(), requires_grad=False))
        self.register_parameter("tied", self.embed)
        self.register_buffer("ages", torch.arange(3))

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for i, (name, value) in enumerate(weights):
            if i == self.stops_at:
                raise RuntimeError("the loader stops here")
            getattr(self, name).data.copy_(value)


def old_weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(9, 4, generator=draw),
        "turned": torch.randn(6, 5, generator=draw).t(),
        "halved": torch.randn(7, generator=draw).to(torch.bfloat16),
        "norm": torch.randn(4, generator=draw),
    }


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Any:
    """A worker with a model of four tensors, and the folder that it was started from."""
    monkeypatch.setattr(proof, "worker_report", lambda _, updated: "{}")
    start = tmp_path / "start"
    start.mkdir()
    save_file({name: value.contiguous() for name, value in old_weights().items()}, start / "model.safetensors")
    model = Model()
    return SimpleNamespace(
        rank=0,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_runner=SimpleNamespace(get_model=lambda: model, device=torch.device("cpu")),
        model_config=SimpleNamespace(
            model=str(start), revision=None, quantization=None, hf_config=SimpleNamespace(tie_word_embeddings=True)
        ),
        vllm_config=SimpleNamespace(load_config=SimpleNamespace(download_dir=None, load_format="auto")),
    )


@pytest.fixture
def new(tmp_path) -> Path:
    """All tensors, with other values."""
    made = tmp_path / "new.safetensors"
    save_file({name: value.contiguous() + 1 for name, value in old_weights().items()}, made)
    return made


def ask(engine: Any, command: str, **argument: Any) -> Any:
    return json.loads(worker.handle(engine, command, json.dumps(argument)))


def stage(engine: Any, path: Path, finite: bool = False, partial: bool = False) -> Any:
    return ask(engine, "stage", source=source(path), timeout=1.0, finite=finite, partial=partial)


def values(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.model_runner.get_model().state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in {*left, *right})


def test_staging_changes_nothing_and_commit_everything(engine, new) -> None:
    """Not one byte before `commit`; all of them after it; then that is the state that counts."""
    ask(engine, "baseline")
    before = values(engine)
    staged = stage(engine, new)
    assert staged["tensors"] == 4
    assert same(values(engine), before)
    assert ask(engine, "changes")["changed"] == []
    assert ask(engine, "commit", keep_old=True) == {}
    after = values(engine)
    assert all(torch.equal(after[name], value) for name, value in load_file(new).items())
    assert set(ask(engine, "changes")["changed"]) == {"embed", "turned", "halved", "norm"}
    assert "error" not in ask(engine, "finish")
    assert ask(engine, "changes")["changed"] == []
    assert stage(engine, new)["checksum"] == staged["checksum"]  # of the bytes, wherever they are staged


@pytest.mark.parametrize("stops_at", range(4))
def test_a_loader_that_stops_anywhere(engine, new, stops_at) -> None:
    """The old weights come back byte by byte, and the same update can then be done."""
    ask(engine, "baseline")
    before = values(engine)
    stage(engine, new)
    engine.model_runner.get_model().stops_at = stops_at
    assert "the loader stops here" in ask(engine, "commit", keep_old=True)["error"]
    assert same(values(engine), before) is (stops_at == 0)
    assert ask(engine, "rollback") == {}
    assert same(values(engine), before)
    engine.model_runner.get_model().stops_at = -1
    stage(engine, new)
    assert ask(engine, "commit", keep_old=True) == {}
    assert not same(values(engine), before)


def test_without_the_old_weights(engine, new) -> None:
    """`keep_old=False` saves their memory: what a failure changed stays, and is said; what it did not change is no failure."""
    ask(engine, "baseline")
    for stops_at, said in ((0, {}), (2, {"error": "the old weights were not kept (keep_old=False)"})):
        stage(engine, new)
        engine.model_runner.get_model().stops_at = stops_at
        assert "error" in ask(engine, "commit", keep_old=False)
        assert ask(engine, "rollback") == said
    assert "nothing is staged" in ask(engine, "commit", keep_old=True).get("error", "") or ask(engine, "drop") == {}


def test_commit_without_stage(engine) -> None:
    """Refused."""
    assert ask(engine, "commit", keep_old=True) == {"error": "nothing is staged"}


def test_values_that_are_not_finite(engine, tmp_path) -> None:
    """Refused where that was asked for, taken where not."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensors = {name: value.contiguous() for name, value in old_weights().items()}
        tensors["halved"][3] = bad
        save_file(tensors, tmp_path / "bad.safetensors")
        assert stage(engine, tmp_path / "bad.safetensors", finite=True) == {"error": "halved holds values that are not finite"}
        assert stage(engine, tmp_path / "bad.safetensors")["tensors"] == 4


def test_a_file_that_changes_between_stage_and_commit(engine, new) -> None:
    """Not what was checked: the commit fails, and the old weights come back."""
    ask(engine, "baseline")
    before = values(engine)
    stage(engine, new)
    save_file({name: value.contiguous() + 2 for name, value in old_weights().items()}, new)
    os.utime(new, ns=(1, 1))
    assert "was changed after it was opened" in ask(engine, "commit", keep_old=True)["error"]
    assert ask(engine, "rollback") == {}
    assert same(values(engine), before)


def test_what_is_packed_needs_a_reload(engine, new) -> None:
    """Experts, MLA and quantized layers on a vLLM without layerwise reload: refused by name. Partial ones: always."""
    engine.model_runner.get_model().w13_weight = None
    assert "vLLM before 0.16.0" in stage(engine, new)["error"]
    engine.model_runner.reload_weights = lambda weights_iterator=None: None
    assert "send all tensors" in stage(engine, new, partial=True)["error"]
    assert stage(engine, new)["tensors"] == 4


def test_a_fingerprint_sees_every_byte(engine) -> None:
    """One bit anywhere in any parameter or buffer; a tied one under one name."""
    model = engine.model_runner.get_model()
    before = worker.fingerprint(engine)
    assert set(before) == {"embed", "turned", "halved", "norm", "ages"}
    for name in before:
        value = getattr(model, name).data
        flat = value.view(torch.uint8) if value.is_contiguous() else value.t().view(torch.uint8)
        for at in range(flat.numel()):
            one = flat.view(-1)[at : at + 1]
            one ^= 1
            now = worker.fingerprint(engine)
            assert {key for key in before if now[key] != before[key]} == {name}
            one ^= 1
    assert worker.fingerprint(engine) == before


def test_a_checksum_is_of_the_bytes_alone() -> None:
    """Wherever they lie, whatever their number: a slice has the checksum of its copy, and another one with any bit changed."""
    held = torch.arange(256, dtype=torch.uint8).repeat(2)
    for start, count in itertools.product((0, 1, 2, 4, 8, 13), (0, 1, 7, 8, 9, 64, 67)):
        part = held[start : start + count]
        copy = part.clone()
        assert worker._checksum(part) == worker._checksum(copy)
        for at in range(count):
            copy[at] ^= 128
            assert worker._checksum(part) != worker._checksum(copy)
            copy[at] ^= 128


PACKED = """
import json, sys
import torch
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from types import SimpleNamespace
from vllm_compat.weights import worker

def packed(weight):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    layer.input_size, layer.params_dtype = weight.shape[1], weight.dtype
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    model = torch.nn.Module()
    model.layer = layer
    engine = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    assert not layer.weight.numel()
    return worker.fingerprint(engine)["layer.weight"]

found = []
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    again = {packed(weight) for _ in range(20)}
    seen = 0
    for i in range(200):
        other = weight.clone()
        other[i % 96, (i * 37) % 320] *= 1.5
        seen += packed(other) not in again
    found.append([len(again), seen, packed(weight * (1 + 1e-2)) not in again])
print("RESULT " + json.dumps(found))
"""


def test_a_fingerprint_of_packed_layers(run_python) -> None:
    """vLLM's own packing: the same weights packed again have the same one, others another; almost always by one element alone."""
    for same_ones, seen, all_moved in run_python(PACKED).ok().result:
        assert same_ones == 1
        assert seen >= 190
        assert all_moved


# --- the front ----------------------------------------------------------------------------------------------------------


def driven(answers: dict[str, asyncio.Event]) -> Any:
    """A block whose engine answers a command when its event is set."""

    async def call(_: str, command: str, argument: str) -> str:
        await answers[command].wait()
        return json.dumps({"said": command})

    block = object.__new__(weight_update)
    block.engine = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=call))
    return block


@pytest.mark.parametrize("times", [1, 3])
def test_a_cancelled_task_learns_what_it_began(times) -> None:
    """Cancelled while `finish` is under way: the engine goes on with the new weights, so the update is complete; then the task
    is cancelled. Any other phase ends as failed, after the engine's answer."""

    async def run(command: str) -> list[Any]:
        event = asyncio.Event()
        block, seen = driven({command: event}), []

        def steps() -> Any:
            try:
                seen.append((yield "core", command, {}))
            except BaseException as error:
                seen.append(type(error))
                raise

        task = asyncio.create_task(block._drive_async(steps()))
        for _ in range(times):
            await asyncio.sleep(0.01)
            task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()  # what began is waited for
        event.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen

    assert asyncio.run(run("finish")) == [[{"said": "finish"}]]
    assert asyncio.run(run("begin")) == [asyncio.CancelledError]
