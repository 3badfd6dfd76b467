"""The trainer's float32 head against float64, and its processed logprobs against the formula and the recorded V0 engine."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from support import PARITY
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_compat import recording, trainer, v0_formula
from vllm_compat.errors import InputError
from vllm_compat.head import full_float32
from vllm_compat.trainer import fp32_lm_head, processed_logprobs
from vllm_compat.v0_formula import Setting

VOCAB, EOS = 300, 298
SIZE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": False}),
    "qwen3 tied": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "gemma2": (transformers.Gemma2Config, {"tie_word_embeddings": True, "final_logit_softcapping": 3.0}),
    "granite": (transformers.GraniteConfig, {"tie_word_embeddings": False, "logits_scaling": 8.0}),
}
IDS = torch.tensor([[5, 17, 200, 31, 4, 99, 250], [7, 7, 8, 120, 66, 290, 3]])


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """A tiny seeded model whose logits are large enough that bfloat16 rounds them visibly."""
    kind, more = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZE, **more))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.to(dtype).eval()


def after(name: str, logits: torch.Tensor) -> torch.Tensor:
    """What the architecture does to its logits."""
    if name == "gemma2":
        return 3.0 * torch.tanh(logits / 3.0)
    return logits / 8.0 if name == "granite" else logits


def with_hidden(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits, and the hidden states its head was given."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, given: seen.append(given[0]))
    logits = model(IDS).logits
    hook.remove()
    return logits, seen[0]


def off(found: torch.Tensor, exact: torch.Tensor | float = 0.0) -> float:
    return float((found - exact).detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_float32_products_of_the_live_weight(name, dtype):
    """Logits equal float64 products of the same 16-bit values, soft cap and scale included; the old ones did not."""
    model = build(name, dtype)
    plain = model(IDS).logits
    with fp32_lm_head(model):
        logits, hidden = with_hidden(model)
    assert (plain.dtype, logits.dtype, hidden.dtype) == (dtype, torch.float32, dtype)
    exact = after(name, hidden.double() @ model.get_output_embeddings().weight.double().t())
    assert off(logits, exact) < 3e-6 * off(exact)
    assert off(plain, exact) > 100 * off(logits, exact)


@pytest.mark.parametrize("name", MODELS)
def test_undo_and_float32_models(name):
    """After remove() the model is as it was, to the bit; a float32 model has the same logits with and without."""
    model = build(name)
    before, state = model(IDS).logits, {**vars(model.get_output_embeddings())}
    handle = fp32_lm_head(model)
    assert not torch.equal(model(IDS).logits, before)
    handle.remove()
    handle.remove()
    assert torch.equal(model(IDS).logits, before)
    assert vars(model.get_output_embeddings()).keys() == state.keys()
    assert not model._forward_hooks
    full = build(name, torch.float32)
    before = full(IDS).logits
    with fp32_lm_head(full):
        torch.testing.assert_close(full(IDS).logits, before, rtol=1e-6, atol=1e-6)


def test_an_update_in_place_is_visible_at_once():
    """No copy of the weight is kept: a changed weight changes the next call."""
    model = build("qwen3 tied")
    with fp32_lm_head(model), torch.no_grad():
        model(IDS)
        model.get_output_embeddings().weight.mul_(0.5)
        logits, hidden = with_hidden(model)
        exact = hidden.double() @ model.get_input_embeddings().weight.double().t()
    assert off(logits, exact) < 3e-6 * off(exact)


def test_a_deep_copy_has_its_own_head():
    """A copied policy (a reference model) computes with its own weight, in float32 too."""
    model = build("qwen3")
    fp32_lm_head(model)
    other, before = copy.deepcopy(model), model(IDS).logits
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert torch.equal(other(IDS).logits, before)
    assert off(model(IDS).logits) == 0


@pytest.mark.parametrize("blocks", [1, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_against_float64(blocks, bias, monkeypatch):
    """Weight, bias and hidden states get the float64 gradient, rounded once to their own dtype."""
    model = build("qwen3")
    head = torch.nn.Linear(64, VOCAB, bias=bias, dtype=torch.bfloat16)
    model.set_output_embeddings(head)
    if blocks > 1:
        monkeypatch.setattr(trainer, "_BLOCK", 64 * (VOCAB // blocks))
    fp32_lm_head(model)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 5, 64, generator=random).bfloat16().requires_grad_()
    weights = torch.randn(3, 5, VOCAB, generator=random)
    logits = head(hidden)
    assert logits.dtype == torch.float32
    (logits.log_softmax(-1) * weights).sum().backward()
    exact = {name: value.detach().double().requires_grad_() for name, value in (*head.named_parameters(), ("hidden", hidden))}
    expected = torch.nn.functional.linear(exact["hidden"], exact["weight"], exact.get("bias"))
    (expected.log_softmax(-1) * weights.double()).sum().backward()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-5)
    for name, value in (*head.named_parameters(), ("hidden", hidden)):
        assert value.grad.dtype == torch.bfloat16
        torch.testing.assert_close(value.grad.double(), exact[name].grad, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_whole_models(name):
    """In a float32 model, tied or not, every parameter gets the gradient it had."""
    grads = []
    for wrapped in (False, True):
        model = build(name, torch.float32)
        if wrapped:
            fp32_lm_head(model)
        model(IDS, labels=IDS).loss.backward()
        grads.append({key: value.grad for key, value in model.named_parameters()})
    assert all(value is not None for value in grads[0].values())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


class Widened(TorchDispatchMode):
    """The largest float32 tensor of the head's width that any operation made, other than logits and weight gradient."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and made.dtype == torch.float32 and made.shape[-1] == 64:
            self.largest = max(self.largest, made.shape[0])
        return made


def test_no_float32_copy_of_the_head_exists(monkeypatch):
    """Forward and backward widen a block of the vocabulary at a time."""
    monkeypatch.setattr(trainer, "_BLOCK", 64 * 50)
    model = build("qwen3")
    fp32_lm_head(model)
    with Widened() as watched:
        model.get_output_embeddings()(torch.ones(2, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert watched.largest == 50


def test_autocast_rounds_as_the_engine_does():
    """float32 master weights under autocast: 16-bit values, float32 products, also with the backward pass inside."""
    model = build("llama", torch.float32)
    weight = model.get_output_embeddings().weight
    with fp32_lm_head(model), torch.autocast("cpu", torch.bfloat16):
        logits, hidden = with_hidden(model)
        logits.sum().backward()
    assert logits.dtype == torch.float32
    exact = hidden.bfloat16().double() @ weight.detach().bfloat16().double().t()
    assert off(logits, exact) < 3e-6 * off(exact)
    rounded = hidden.detach().bfloat16().double().reshape(-1, 64).sum(0)
    torch.testing.assert_close(weight.grad[0].double(), rounded, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_faster_matrix_products_are_off_and_come_back(precision):
    """The head's products run without torch's reduced float32 modes and without autocast; the program's choice returns."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        chosen = [switch.fp32_precision for switch in switches]
        with torch.autocast("cpu", torch.bfloat16):
            with full_float32("cpu"):
                assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert [switch.fp32_precision for switch in switches] == chosen
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


class Quantized(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x)


class OtherTensor(torch.Tensor):
    pass


def refuse(model: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fp32_lm_head(model)


def test_heads_that_are_refused():
    """Quantized, wrapped, foreign, doubled and absent heads raise, and say what to do."""
    refuse(torch.nn.DataParallel(torch.nn.Linear(2, 2)), r"DataParallel has no get_output_embeddings\(\)")
    model = build("qwen3")
    model.set_output_embeddings(Quantized(64, VOCAB))
    refuse(model, "Quantized: only a plain torch.nn.Linear.*Exclude the lm_head from quantization")
    model.set_output_embeddings(torch.nn.Linear(64, VOCAB, dtype=torch.float64))
    refuse(model, "float64 weight")
    head = torch.nn.Linear(64, VOCAB)
    head.weight = torch.nn.Parameter(head.weight.detach().as_subclass(OtherTensor))
    model.set_output_embeddings(head)
    refuse(model, "OtherTensor weight: quantized, or sharded")
    model = build("qwen3")
    with fp32_lm_head(model):
        refuse(model, "already replaced")
    fp32_lm_head(model)
    refuse(transformers.AutoModel.from_config(model.config), "NoneType: only a plain")


def test_models_that_round_or_bypass_are_refused():
    """A model that rounds its logits afterwards, or hides them in a fused loss, raises from its call."""
    model = build("qwen3")
    forward = model.forward
    fp32_lm_head(model)
    model.forward = lambda ids: SimpleNamespace(logits=forward(ids).logits.bfloat16())
    with pytest.raises(InputError, match=r"returned torch.bfloat16 logits: it rounds them"):
        model(IDS)
    model.forward = lambda ids: SimpleNamespace(loss=1.0, logits=None)
    with pytest.raises(InputError, match="a fused loss bypasses the float32 head"):
        model(IDS)
    model.forward = forward
    assert model(IDS, return_dict=False)[0].dtype == torch.float32


def random_setting(random: np.random.Generator) -> Setting:
    def maybe(value: object, neutral: object) -> object:
        return value if random.random() < 0.5 else neutral

    return Setting(
        temperature=float(random.choice([0.0, 0.3, 0.7, 1.0, 1.5])),
        top_k=maybe(int(random.integers(1, 40)), 0),
        top_p=maybe(float(random.uniform(0.3, 0.99)), 1.0),
        min_p=maybe(float(random.uniform(0.001, 0.2)), 0.0),
        repetition_penalty=maybe(float(random.uniform(0.7, 1.6)), 1.0),
        frequency_penalty=maybe(float(random.uniform(-1, 1)), 0.0),
        presence_penalty=maybe(float(random.uniform(-1, 1)), 0.0),
        logit_bias=maybe({3: 2.0, 11: -4.0}, {}),
        forbidden=maybe([5, 6], ()),
    )


def case(seed: int) -> tuple:
    """(logits float64 [steps, vocab], tokens, setting, prompt). Half of the tokens are likely ones."""
    random = np.random.default_rng(seed)
    steps, vocab = int(random.integers(1, 12)), 50
    logits = torch.from_numpy(random.normal(0, 2.5, (steps, vocab)))
    tokens = [int(row.argmax()) if random.random() < 0.5 else int(random.integers(vocab)) for row in logits]
    return logits, torch.tensor(tokens), random_setting(random), random.integers(0, vocab, 6).tolist()


def formula(logits: torch.Tensor, tokens: torch.Tensor, setting: Setting, prompt: list, **more: bool) -> torch.Tensor:
    rows = [
        v0_formula.processed_logprobs(row, setting, prompt, tokens[:step].tolist(), **more)[tokens[step]]
        for step, row in enumerate(logits)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_processed_logprobs_against_the_formula(seed, dtype, monkeypatch):
    """Random parameters, prompts and outputs, in blocks of any size: the formula's numbers, row by row."""
    logits, tokens, setting, prompt = case(seed)
    monkeypatch.setattr(trainer, "_BLOCK", 50 * (1 + seed % 5))
    found = processed_logprobs(logits.to(dtype), tokens, setting, prompt_token_ids=prompt)
    assert (found.dtype, found.shape) == (dtype, tokens.shape)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(found.double(), formula(logits, tokens, setting, prompt), rtol=0, atol=tolerance)
    found = processed_logprobs(logits.to(dtype), tokens, setting, prompt_rows=True)
    expected = formula(logits, tokens, setting, prompt, prompt_row=True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_widened(dtype):
    """16-bit logits are taken as they are and computed in float32."""
    logits, tokens, *_ = case(1)
    found = processed_logprobs(logits.to(dtype), tokens, {"temperature": 0.7})
    assert found.dtype == torch.float32
    expected = (logits.to(dtype).double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_a_batch_is_its_sequences():
    """Padded sequences with settings, prompts and lengths of their own, and rubbish in the padding."""
    cases = [case(seed) for seed in range(40, 48)]
    steps = max(len(tokens) for _, tokens, *_ in cases) + 2
    logits = torch.full((8, steps, 50), torch.nan, dtype=torch.float64)
    tokens, mask = torch.full((8, steps), -100), torch.zeros(8, steps)
    for index, (rows, ids, *_) in enumerate(cases):
        logits[index, : len(ids)], tokens[index, : len(ids)], mask[index, : len(ids)] = rows, ids, 1
    mask[7], logits = 0, logits.requires_grad_()
    found = processed_logprobs(logits, tokens.int(), [c[2] for c in cases], prompt_token_ids=[c[3] for c in cases], mask=mask)
    for index, (rows, ids, setting, prompt) in enumerate(cases[:7]):
        torch.testing.assert_close(found[index, : len(ids)], processed_logprobs(rows, ids, setting, prompt_token_ids=prompt))
    assert (found[mask == 0] == 0).all()
    found[found.isfinite()].sum().backward()
    assert logits.grad[mask == 1].isfinite().all()
    assert (logits.grad[mask == 0] == 0).all()


def test_gaps_in_the_mask():
    """Without penalties a token in the middle may be left out; with them it may not."""
    logits, tokens, *_ = case(2)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0] = False
    found = processed_logprobs(logits, tokens, {}, mask=mask)
    assert found[0] == 0
    torch.testing.assert_close(found[1:], processed_logprobs(logits, tokens, {})[1:])
    with pytest.raises(InputError, match="a False in front of a True"):
        processed_logprobs(logits, tokens, {"presence_penalty": 1.0}, mask=mask)


@pytest.mark.parametrize("seed", range(12))
def test_gradient_of_processed_logprobs(seed, monkeypatch):
    """Within the kept set the gradient is the numerical one; a removed token has none."""
    logits, tokens, setting, prompt = case(seed)
    monkeypatch.setattr(trainer, "_BLOCK", 100)
    logits.requires_grad_()
    found = processed_logprobs(logits, tokens, setting, prompt_token_ids=prompt)
    kept = found.isfinite()
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert (grad[~kept] == 0).all()
    if kept.any():

        def selected(given: torch.Tensor) -> torch.Tensor:
            return processed_logprobs(given, tokens, setting, prompt_token_ids=prompt)[kept]

        assert torch.autograd.gradcheck(selected, (logits,), eps=1e-7, atol=1e-5, fast_mode=True)


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    """Between forward and backward no [rows, vocab] tensor is held besides the logits themselves."""
    held = []
    monkeypatch.setattr(trainer, "_BLOCK", 4 * 500)
    logits = torch.randn(2, 64, 500, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        processed_logprobs(logits, torch.zeros(2, 64, dtype=torch.long), {"top_p": 0.9, "temperature": 0.7})
    own = {logits.untyped_storage().data_ptr()}
    assert sum(tensor.numel() for tensor in held if tensor.untyped_storage().data_ptr() not in own) < 64 * 500


FIELDS = {
    "temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1, "presence_penalty": 0.3,
    "frequency_penalty": 0.2, "logit_bias": {3: 2.0}, "allowed_token_ids": list(range(40)), "min_tokens": 2,
    "stop_token_ids": [9], "max_tokens": 5, "seed": 1,
}  # fmt: skip


def test_mappings_and_objects_mean_the_same():
    """A mapping, an object with SamplingParams' fields and the formula's Setting give the same numbers."""
    logits, tokens, _, prompt = case(10)
    assert len(tokens) > 4  # more than min_tokens
    object_ = SimpleNamespace(**FIELDS, bad_words=[], structured_outputs=None)
    more = {"prompt_token_ids": prompt, "eos_token_id": 7}
    found = processed_logprobs(logits, tokens, FIELDS, **more)
    assert torch.equal(found, processed_logprobs(logits, tokens, object_, **more))
    assert torch.equal(found, processed_logprobs(logits, tokens, {**FIELDS, "logit_bias": {"3": 2.0}}, **more))
    named = {
        k: v for k, v in FIELDS.items() if k not in ("allowed_token_ids", "min_tokens", "stop_token_ids", "max_tokens", "seed")
    }
    for step in range(len(tokens)):
        setting = Setting(**named, forbidden=[*range(40, 50), *([7, 9] if step < 2 else [])])
        expected = v0_formula.processed_logprobs(logits[step], setting, prompt, tokens[:step].tolist())[tokens[step]]
        torch.testing.assert_close(found[step], expected, rtol=0, atol=1e-12)
    low = processed_logprobs(logits, tokens, {"temperature": 1e-6})
    assert torch.equal(low, processed_logprobs(logits, tokens, Setting(temperature=0.01)))


def test_min_tokens_ends():
    """The end of sequence is forbidden for the first min_tokens tokens and no longer."""
    logits, *_ = case(10)
    ends = torch.tensor([7, 9, 7, 9, 7, 9, 7, 9, 7])
    found = processed_logprobs(logits, ends, {"min_tokens": 3, "stop_token_ids": [9]}, eos_token_id=7)
    assert found.isfinite().tolist() == [False] * 3 + [True] * 6
    assert torch.equal(found[3:], processed_logprobs(logits, ends, {})[3:])


def test_the_likeliest_token_is_always_kept():
    """A top-p so small that 1 - top_p is 1 in float32 keeps one token and not none."""
    logits, *_ = case(10)
    assert (processed_logprobs(logits.float(), logits.argmax(-1), {"top_p": 1e-9}) == 0).all()


def test_real_sampling_params(run_python):
    """vLLM's own SamplingParams reads like the mapping it was made of."""
    done = run_python(
        """
        import json, sys
        import torch
        from vllm import SamplingParams
        from vllm_compat.trainer import processed_logprobs
        fields = json.loads(sys.argv[1])
        fields["logit_bias"] = {3: 2.0}
        torch.manual_seed(0)
        logits = torch.randn(6, 50) * 3
        tokens = logits.argmax(-1)
        more = {"prompt_token_ids": [1, 2, 3], "eos_token_id": [7]}
        one = processed_logprobs(logits, tokens, fields, **more)
        two = processed_logprobs(logits, tokens, SamplingParams(**fields), **more)
        greedy = processed_logprobs(logits, tokens, SamplingParams(temperature=0, top_k=3))
        plain = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        print("RESULT", json.dumps([torch.equal(one, two), bool(one.isfinite().any()), torch.equal(greedy, plain)]))
        """,
        json.dumps(FIELDS),
    ).ok()
    assert done.result == [True, True, True]


@pytest.mark.parametrize(
    ("params", "more", "message"),
    [
        ({"top-p": 0.9}, {}, "no sampling parameter of vLLM: top-p"),
        ({"bad_words": ["x"]}, {}, "bad_words: changes the distribution"),
        (SimpleNamespace(temperature=1.0, top_p=1.0, top_k=0, structured_outputs={"json": {}}), {}, "structured_outputs"),
        (0.7, {}, "params is a float"),
        ({"repetition_penalty": 1.2}, {}, "give prompt_token_ids"),
        ({"repetition_penalty": 1.2}, {"prompt_token_ids": [[1]]}, "one list of ids"),
        ({"repetition_penalty": 1.2}, {"prompt_token_ids": [50]}, "ids from 0 to 49"),
        ({"min_tokens": 1}, {}, "give eos_token_id"),
        ({"allowed_token_ids": [1, 77]}, {}, r"outside 0 to 49: \[1, 77\]"),
        ({"logit_bias": {50: 1.0}}, {}, "outside 0 to 49"),
        ([{}, {}], {}, "2 params and 1 prompts for 1 sequences"),
        ({}, {"mask": torch.ones(2)}, r"want \[batch, steps, vocab\]"),
    ],
)
def test_parameters_that_are_refused(params, more, message):
    """What would give another distribution than the engine's raises instead."""
    logits, tokens, *_ = case(2)
    assert len(tokens) != 2
    with pytest.raises(InputError, match=message):
        processed_logprobs(logits, tokens, params, **more)
    with pytest.raises(InputError, match="values outside 0 to 49"):
        processed_logprobs(logits, tokens - 100, {})


REFERENCE = recording.load(PARITY / "v0_float32.safetensors")


@pytest.fixture(scope="module")
def shipped() -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(PARITY / "model", dtype=torch.float32).eval()


def agree(found: torch.Tensor, recorded: np.ndarray, tolerance: float) -> None:
    """The same tokens removed, except those that V0 drops by float32 underflow, and the same logprobs."""
    expected = torch.from_numpy(recorded)
    assert not ((found.isfinite() != expected.isfinite()) & (torch.maximum(found, expected) > -80)).any()
    both = found.isfinite() & expected.isfinite()
    assert float((found - expected)[both].abs().amax()) < tolerance


def every_token(rows: torch.Tensor, params: dict, **more: object) -> torch.Tensor:
    """The whole distributions [rows, vocab], asked for token by token."""
    tokens = torch.arange(VOCAB)[:, None].expand(VOCAB, len(rows))
    return processed_logprobs(rows.expand(VOCAB, *rows.shape), tokens, params, **more).t()


@pytest.mark.parametrize("index", range(len(REFERENCE.settings)), ids=REFERENCE.settings)
def test_against_the_recorded_v0_engine(index, shipped):
    """The shipped model, teacher-forced in transformers: the recorded V0 logprobs of every sampled and every prompt token."""
    params = REFERENCE.experiment["settings"][index][1]
    # Measured: at most 9.5e-6, and 9.9e-5 at a tenth of the temperature, which has ten times the rounding.
    tolerance = 2e-4 if params.get("temperature") == 0.1 else 2e-5
    for prompt, ids in enumerate(REFERENCE.prompts):
        tokens = torch.from_numpy(REFERENCE.get(index, prompt, "tokens")).long()
        recorded = REFERENCE.get(index, prompt, "logprobs")
        with torch.no_grad(), fp32_lm_head(shipped):
            logits = shipped(torch.tensor([[*ids, *tokens.tolist()]])).logits[0]
        rows = logits[len(ids) - 1 : -1]
        more = {"prompt_token_ids": ids, "eos_token_id": EOS}
        agree(processed_logprobs(rows, tokens, params, **more), recorded[range(len(tokens)), tokens], tolerance)
        # the whole first distribution: each token of the vocabulary as if it had been sampled
        more = {"prompt_token_ids": [ids] * VOCAB, "eos_token_id": EOS}
        agree(every_token(rows[:1], params, **more)[0], recorded[0], tolerance)
        wanted = REFERENCE.get(index, prompt, "prompt_logprobs")
        if wanted is not None:
            found = every_token(logits[: len(ids) - 1], params, prompt_rows=True, eos_token_id=EOS)
            agree(found, wanted, tolerance)


def test_both_modules_are_imported_on_demand(run_python):
    """`import vllm_compat` loads neither metrics nor trainer, and importing those loads neither torch nor numpy."""
    done = run_python(
        """
        import json, sys
        import vllm_compat
        before = [name for name in ("vllm_compat.metrics", "vllm_compat.trainer") if name in sys.modules]
        import vllm_compat.metrics, vllm_compat.trainer
        print("RESULT", json.dumps([before, [name for name in ("torch", "numpy", "vllm") if name in sys.modules]]))
        """
    ).ok()
    assert done.result == [[], []]
