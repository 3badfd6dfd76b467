"""The float32 head's arithmetic, on the CPU: every way of computing it against float64, and what decides between them."""

from __future__ import annotations

import threading

import pytest
import torch

from vllm_compat import head

VOCAB, WIDTH = 8_233, 130  # no step, tile or block divides them
EXACT = 1e-6  # of the largest logit


def pair(batch: int = 7, dtype: torch.dtype = torch.bfloat16, vocab: int = VOCAB, width: int = WIDTH):
    """Seeded hidden states and weight."""
    random = torch.Generator().manual_seed(batch)
    return torch.randn(batch, width, generator=random).to(dtype), torch.randn(vocab, width, generator=random).to(dtype)


def off(found: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> float:
    exact = hidden.double() @ weight.double().t()
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.fixture(params=["as it is", "float32 instructions"])
def compiled(request):
    """The product of head.c, for this processor and as one without bfloat16 instructions has it."""
    if request.param == "as it is":
        words, product = head._compiled()
        assert product, words
        return product
    words, product = head._build("cc", "-mno-avx512bf16")
    assert words == "a compiled product (float32)"
    return product


@pytest.mark.parametrize("batch", [1, 2, 5, 6, 7, 13, 64, 200])
@pytest.mark.parametrize(("vocab", "width"), [(VOCAB, WIDTH), (3, 1), (129, 31), (128, 64), (130, 1000)])
def test_the_compiled_product(compiled, batch, vocab, width):
    """Every remainder of rows, columns and width: float32 sums of exact products, no worse than twice torch's own."""
    hidden, weight = pair(batch, vocab=vocab, width=width)
    found = compiled(hidden, weight)
    assert (found.dtype, found.shape, found.is_contiguous()) == (torch.float32, (batch, vocab), True)
    plain = off(hidden.float() @ weight.float().t(), hidden, weight)
    assert off(found, hidden, weight) < max(2 * plain, 2e-7)


def test_a_row_does_not_depend_on_its_batch_or_on_threads(compiled):
    """Bit for bit: batch-invariant."""
    hidden, weight = pair(64)
    whole, threads = compiled(hidden, weight), torch.get_num_threads()
    for batch in (1, 2, 5, 6, 7, 33):
        assert torch.equal(compiled(hidden[:batch], weight), whole[:batch])
        assert torch.equal(compiled(hidden[-batch:], weight), whole[-batch:])
    try:
        torch.set_num_threads(1)
        assert torch.equal(compiled(hidden, weight), whole)
    finally:
        torch.set_num_threads(threads)


def test_results_belong_to_the_call(compiled):
    """Threads at once: each gets its own logits, and they stay."""
    jobs = [pair(batch) for batch in range(1, 9)]
    expected = [compiled(*job) for job in jobs]
    found: list[list[torch.Tensor]] = [[] for _ in jobs]

    def work(i: int) -> None:
        found[i] = [compiled(*jobs[i]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, right) for many, right in zip(found, expected, strict=True) for one in many)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear(dtype, weight_dtype):
    """Any pair of dtypes, leading dimensions, a bias, a weight that is not contiguous: float32, contiguous and exact."""
    hidden, weight = pair(6, dtype)[0], pair(6)[1].to(weight_dtype)
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).to(weight_dtype)
    for given in (weight, weight.t().contiguous().t()):
        found = head.linear(hidden.reshape(2, 3, WIDTH), given, bias)
        assert (found.dtype, found.shape, found.is_contiguous()) == (torch.float32, (2, 3, VOCAB), True)
        assert off(found.reshape(6, VOCAB) - bias.float(), hidden, weight) < EXACT
        assert head.linear(hidden[:0], given).shape == (0, VOCAB)


def test_nothing_of_the_weight_is_kept(compiled):
    """A change in place, of one element or of all, is in the next product."""
    hidden, weight = pair()
    before = compiled(hidden, weight)
    weight[4000] *= 2
    after = compiled(hidden, weight)
    assert torch.equal(after[:, 4000], before[:, 4000] * 2)
    weight.mul_(0.5)
    assert torch.equal(compiled(hidden, weight), after * 0.5)


def test_blocks(monkeypatch):
    """The fallback is the same product, whatever the blocks."""
    hidden, weight = pair()
    for elements in (1, WIDTH * 100, 2**24):
        monkeypatch.setattr(head, "_CPU_BLOCK", elements)
        assert off(head.blocked(hidden, weight), hidden, weight) < EXACT


def test_what_is_used_is_said(monkeypatch):
    """The words and the function come from one place: small heads, other dtypes and strides, and no compiler each have their own."""
    hidden, weight = pair()
    words, product = head.way(hidden, weight)
    assert words.startswith("a compiled product")
    assert product is not head.blocked
    for other, says in (
        ((hidden, weight[:100]), "widened in turn"),
        ((hidden.half(), weight.half()), "only a contiguous bfloat16"),
        ((hidden, weight.t().contiguous().t()), "only a contiguous bfloat16"),
        ((hidden.float(), weight), "widened in turn"),
    ):
        words, product = head.way(*other)
        assert says in words
        assert product is head.blocked
    assert head.way(hidden, weight.float())[0] == "one float32 product"
    monkeypatch.setattr(head.shutil, "which", lambda name: None)
    head._compiled.cache_clear()
    try:
        words, product = head.way(hidden, weight)
        assert words == "blocks of the weight widened in turn (no compiled product: no C compiler)"
        assert product is head.blocked
        monkeypatch.setattr(head.shutil, "which", lambda name: "/bin/false")
        monkeypatch.setattr(head, "_FLAGS", ("--no-such-flag",))
        head._compiled.cache_clear()
        words, product = head.way(hidden, weight)
        assert "no compiled product: " in words
        assert "no-such-flag" in words or "No such file" in words
        assert product is head.blocked
        assert off(head.linear(hidden, weight), hidden, weight) < EXACT
    finally:
        head._compiled.cache_clear()


def test_a_wrong_compiler_is_found_out(monkeypatch):
    """A product that is not exact is not used."""
    hidden, weight = pair()
    build = head._build
    monkeypatch.setattr(head, "_build", lambda name: ("broken", lambda x, w: build(name)[1](x, w) * (1 + 1e-4)))
    head._compiled.cache_clear()
    try:
        words, product = head.way(hidden, weight)
        assert "is not exact" in words
        assert product is head.blocked
    finally:
        head._compiled.cache_clear()


def test_rounding_back_would_be_seen():
    """The negative control: a bfloat16 head is off by a thousand times as much."""
    hidden, weight = pair()
    assert off(torch.nn.functional.linear(hidden, weight), hidden, weight) > 1e3 * off(
        head.linear(hidden, weight), hidden, weight
    )
