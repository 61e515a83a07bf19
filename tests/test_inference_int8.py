"""A dense output layer in int8: the best outputs are exact, so searches find what they would have found."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from gap_hf import GaPError, inference_report, optimize_for_inference, restore
from gap_hf.bench.rivals import KINDS
from gap_hf.bench.subject import subject_of
from gap_hf.inference import choice, optimize, product
from gap_hf.inference.int8 import ANEW, INT8, int8
from gap_hf.inference.zeros import Structure
from tests import toys


@pytest.fixture(autouse=True)
def always_other_than_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAP_HF_CACHE", str(tmp_path / "cache"))
    choice.MEMORY.forget()
    monkeypatch.setattr(optimize, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(product, "fastest", lambda runs: next((n for n in runs[0] if n != choice.DENSE), choice.DENSE))


def form_of(weight: Tensor) -> Any:
    return int8(weight, weight != 0, Structure(INT8, 1, 1.0))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_best_are_exact_and_the_others_near(dtype: torch.dtype, data: st.DataObject) -> None:
    num_out, num_in = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 140))
    shape = data.draw(st.sampled_from([(1,), (3,), (2, 4), (1, 1, 5)]))
    weight = numbers(num_out, num_in, seed=data.draw(st.integers(0, 99))).to(dtype)
    weight[: data.draw(st.integers(0, num_out))] *= data.draw(st.sampled_from([0, 1, 1000]))
    bias = numbers(num_out, seed=5).to(dtype) if data.draw(st.booleans()) else None
    x = numbers(*shape, num_in, seed=data.draw(st.integers(0, 99))).to(dtype)
    got = form_of(weight)(x, bias, 1)
    assert got.dtype is dtype and got.shape == (*shape, num_out)
    want = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    # A weight is rounded to 1/127 of its row's largest, an input to 1/127 of the range of all.
    row = weight.abs().amax(dim=1).double()
    spread = (x.amax() - x.amin()).double() + x.abs().amax().double()
    bound = num_in * (row * x.abs().amax().double() + row * spread) / 100 + 0.01 * want.abs() + 1e-3
    assert bool(((got.double() - want).abs() <= bound).all())
    plain = torch.nn.functional.linear(x, weight, bias)
    rounding = 1e-5 if dtype is torch.float32 else 0.02
    best = got.float().topk(min(ANEW, num_out) // 2 or 1, dim=-1).indices
    torch.testing.assert_close(
        got.gather(-1, best), plain.gather(-1, best), rtol=rounding, atol=rounding * float(row.max()) * num_in
    )


def test_a_bias_decides_which_are_the_best() -> None:
    """Without the bias the second half has the largest outputs, with it the first."""
    weight, x = numbers(200, 64, seed=0), numbers(20, 64, seed=1)
    bias = torch.where(torch.arange(200) < 100, 100.0, 0.0)
    weight[100:] *= 3
    plain = torch.nn.functional.linear(x, weight, bias)
    best = plain.topk(ANEW // 2, dim=-1).indices
    got = form_of(weight)(x, bias, 1).gather(-1, best)
    torch.testing.assert_close(got, plain.gather(-1, best), rtol=1e-6, atol=1e-5)


def test_an_argmax_that_int8_alone_gets_wrong() -> None:
    """Rows that differ by less than a step of int8, at a scale where rounding hides it."""
    weight = numbers(1, 64, seed=0).repeat(20, 1)
    for i in range(20):
        weight[i, i] += 1e-4
    x = numbers(200, 64, seed=1)
    want = (x @ weight.t()).argmax(dim=-1)
    got = form_of(weight)(x, None, 1).argmax(dim=-1)
    assert bool((got == want).float().mean() > 0.97)
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    alone = (x @ ((weight / scales).round() * scales).t()).argmax(dim=-1)
    assert bool((alone == want).float().mean() < 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_runs_dense(bad: float) -> None:
    weight, x = numbers(40, 16, seed=0), numbers(3, 16, seed=1)
    assert form_of(weight)(x.index_fill(1, torch.tensor([2]), bad), None, 1) is None
    weight[3, 3] = bad
    assert form_of(weight) is None


def sparse(model: Any) -> Any:
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.weight *= numbers(*module.weight.shape, seed=3) > 1.2
    return model.eval()


@pytest.mark.parametrize("make", [toys.seq2seq, lambda: toys.causal_lm()])
def test_generate_gives_the_same_tokens(make: Any) -> None:
    model = sparse(make())
    if not any(isinstance(m, nn.Linear) and m is not model.get_output_embeddings() for m in model.modules()):
        for name, param in model.named_parameters():
            if ".h." in name and param.ndim == 2:
                param.data *= numbers(*param.shape, seed=3) > 1.2
    plain = copy.deepcopy(model)
    optimize_for_inference(model, output_layer="int8", token_counts=[1])
    head = inference_report(model)[-1]
    assert head.pattern == "int8" and head.sparsity == 0 and set(head.forms.values()) == {"int8"}
    for batch, beams in ((1, 1), (3, 1), (2, 2)):
        ids = torch.randint(3, 60, (batch, 5), generator=torch.Generator().manual_seed(batch))
        options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            assert type(other.get_output_embeddings().gap_product) is product.Int8Product
            other.get_output_embeddings()(numbers(1, head.shape[1], seed=1))
            assert inference_report(other)[-1].pattern == "int8"
    name = next(layer.name for layer in inference_report(model) if layer.pattern != "int8")
    for masks in (None, {f"{name}.weight": model.get_submodule(name).weight != 0}):
        optimize_for_inference(model, output_layer="int8", masks=masks)
        optimize_for_inference(model, masks=masks)
        assert all(layer.pattern != "int8" for layer in inference_report(model))
    optimize_for_inference(model, output_layer="int8")
    restore(model)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_refusals() -> None:
    model = sparse(toys.seq2seq())
    with pytest.raises(GaPError, match="output_layer: found 'int4', expected None or 'int8'"):
        optimize_for_inference(model, output_layer="int4")
    encoder = BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with torch.no_grad():
        encoder.pooler.dense.weight.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(GaPError, match="output_layer: BertModel has no Linear of at least 1 weights"):
        optimize_for_inference(encoder.eval(), output_layer="int8")
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight *= numbers(*head.weight.shape, seed=4) > 1.2
    with pytest.raises(GaPError, match="output_layer: the output layer is sparse and runs so"):
        optimize_for_inference(model, output_layer="int8")


def test_the_bench_runs_it(tmp_path: Path) -> None:
    from dataclasses import replace

    subject = subject_of(sparse(toys.seq2seq()))
    for asked in (None, "int8"):
        rival: Any = KINDS["ours"].make(replace(subject, output_layer=asked), tmp_path)
        patterns = {layer.pattern for layer in inference_report(rival.model)}
        assert ("int8" in patterns) == (asked == "int8")
