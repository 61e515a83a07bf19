"""Layers optimized for inference give what dense gives, for every input, and are the ordinary ones again when restored."""

from __future__ import annotations

import copy
import io
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import pipeline
from transformers.pytorch_utils import Conv1D

from gap_hf import GaPError, inference_report, optimize_for_inference, restore
from gap_hf.inference import choice, compiled, optimize, product
from gap_hf.inference.forms import FORMS
from gap_hf.inference.zeros import structure_of
from tests import toys

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of choices of the test's own, and a process in which nothing was warned of."""
    monkeypatch.setenv("GAP_HF_CACHE", str(tmp_path / "cache"))
    choice.MEMORY.forget()
    monkeypatch.setattr(optimize, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(product, "_told", set())
    monkeypatch.setattr(compiled, "_state", {"warned": False, "broken": False, "forked": False})
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured, the first form that there is has won."""
    monkeypatch.setattr(product, "fastest", lambda runs: next((n for n in runs[0] if n != choice.DENSE), choice.DENSE))


def prune(weight: Tensor, rows: int = 1, sparsity: float = 0.9, seed: int = 0) -> None:
    """Keep random blocks of `rows` outputs of an (N, K) weight, in place."""
    num_out, num_in = weight.shape
    draw = torch.rand(num_out // rows, num_in, generator=torch.Generator().manual_seed(seed)) >= sparsity
    with torch.no_grad():
        weight *= draw.repeat_interleave(rows, dim=0)


def sparse_linear(num_in: int, num_out: int, rows: int = 1, sparsity: float = 0.9, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(num_in, num_out, bias=bias).requires_grad_(False)
    prune(layer.weight, rows, sparsity)
    return layer


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The slow, plain reference: fp64."""
    return nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def assert_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of a sum of so many products, in the dtype of `got`."""
    want = expected(x, weight, bias)
    magnitude = expected(x.abs(), weight.abs(), None if bias is None else bias.abs())
    error = 8 * torch.finfo(torch.float32).eps * magnitude
    if got.dtype is torch.bfloat16:
        error = error + torch.finfo(torch.bfloat16).eps * want.abs()
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= error + 1e-30).all())


# --- every form against dense -----------------------------------------------------------------------------------------


def form_of(name: str, weight: Tensor):
    live = weight != 0
    return FORMS[name](weight, live, structure_of(live))


@pytest.mark.parametrize("name", ["blocks", "singles", "torch csr", "gathered blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forms_agree_with_dense(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    if name == "torch csr" and dtype is not torch.float32:
        assert form_of(name, torch.zeros(8, 8, dtype=dtype)) is None
        return
    rows = data.draw(st.sampled_from([8, 16, 32, 64])) if "blocks" in name else 1
    num_out = rows * data.draw(st.integers(1, 130 if rows == 1 else 4))
    num_in = data.draw(st.integers(1, 140))
    tokens = data.draw(st.one_of(st.integers(1, 80), st.integers(1, 300)))
    sparsity = data.draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    prune(weight, rows, sparsity, seed=data.draw(st.integers(0, 99)))
    # Outputs without a single weight.
    weight[: rows * data.draw(st.integers(0, num_out // rows))] *= data.draw(st.sampled_from([0, 1]))
    bias = torch.randn(num_out, generator=generator).to(dtype) if data.draw(st.booleans()) else None
    x = torch.randn(tokens, num_in, generator=generator).to(dtype)

    form = form_of(name, weight)
    assert form is not None
    threads = data.draw(st.sampled_from([1, 2, 3])) if name in ("blocks", "singles") else 1
    got = form(x, bias, threads)
    assert got is not None
    assert got.dtype is dtype and got.is_contiguous()
    if dtype is torch.float32 or name in ("blocks", "singles"):
        assert_close(got, x, weight, bias)
    else:  # torch's own bf16 product rounds before the bias is added
        torch.testing.assert_close(got.double(), expected(x, weight, bias), rtol=0.05, atol=0.2)

    place = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(0, num_in - 1))
    x[place] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    assert form(x, bias, threads) is None


@pytest.mark.parametrize("num_in", [2**16, 2**16 + 8])
@pytest.mark.parametrize(("name", "rows"), [("blocks", 8), ("singles", 1)])
def test_columns_beyond_16_bits(name: str, rows: int, num_in: int) -> None:
    weight = torch.zeros(16, num_in)
    weight[:rows, [0, 1, num_in - 1]] = torch.tensor([1.0, 2.0, 3.0])
    form = form_of(name, weight)
    assert form is not None
    for tokens in (1, 9):
        x = torch.randn(tokens, num_in)
        got = form(x, None, 1)
        assert got is not None
        assert_close(got, x, weight, None)


def test_no_token_reads_or_writes_beyond_its_tensors() -> None:
    """What lies around x, y and bias is NaN, and stays out of the result."""
    weight = torch.randn(13, 21)
    prune(weight)
    form = form_of("singles", weight)
    assert form is not None
    around = torch.full((50, 21), float("nan"))
    bias = torch.full((30,), float("nan"))
    bias[5:18] = 1.0
    for tokens in (1, 2, 7, 9, 17, 33):
        around[:] = float("nan")
        x = around[3 : 3 + tokens]
        x[:] = torch.randn(tokens, 21)
        got = form(x, bias[5:18], 1)
        assert got is not None
        assert_close(got, x, weight, bias[5:18])


@pytest.mark.parametrize(
    ("rows", "pattern"), [(1, "unstructured"), (8, "block:8x1"), (16, "block:16x1"), (32, "block:32x1")]
)
def test_the_structure_is_found(rows: int, pattern: str) -> None:
    weight = torch.randn(256, 60)
    prune(weight, rows)
    found = structure_of(weight != 0)
    assert (found.pattern, found.rows) == (pattern, rows)
    assert found.density == pytest.approx(int((weight != 0).sum()) / weight.numel())


def test_two_of_four_is_found_and_a_broken_block_is_not_a_block() -> None:
    assert structure_of(torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0]]).bool()).pattern == "2:4"
    live = torch.zeros(16, 32, dtype=torch.bool)
    live[:, ::10] = True
    live[3, 5] = True
    assert structure_of(live).rows == 1


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("rows", [1, 16])
def test_a_linear_takes_every_shape_that_dense_takes(rows: int) -> None:
    layer = sparse_linear(40, 48, rows)
    plain = copy.deepcopy(layer)
    optimize_for_inference(layer)
    inputs = [torch.randn(*shape, 40) for shape in [(1,), (1, 1), (2, 5), (3, 2, 4), (300,)]]
    inputs += [torch.randn(40), torch.randn(0, 40), torch.randn(2, 0, 40)]
    inputs += [torch.randn(40, 7).t(), torch.randn(5, 80)[:, ::2], torch.randn(1, 40).expand(6, 40)]
    for x in inputs:
        got = layer(x)
        assert got.shape == plain(x).shape
        assert_close(got, x, plain.weight, plain.bias)
    (report,) = inference_report(layer)
    assert report.forms[torch.get_num_threads(), 1] == ("blocks" if rows == 16 else "singles")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(3, 41))


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [1, 16])
def test_an_input_that_is_not_finite_gives_exactly_what_dense_gives(rows: int, bad: float) -> None:
    layer = sparse_linear(40, 48, rows)
    plain = copy.deepcopy(layer)
    optimize_for_inference(layer)
    for tokens in (1, 3, 50):
        x = torch.randn(tokens, 40)
        x[tokens // 2, 7] = bad
        want = plain(x)
        assert want[tokens // 2].isnan().any()  # times a weight of 0
        torch.testing.assert_close(layer(x), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(16, 32, 1),
        lambda: nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        lambda: nn.Conv2d(8, 24, (3, 2), padding=(2, 0), dilation=(2, 1)),
        lambda: Conv1D(48, 40),
    ],
)
def test_other_layers(make) -> None:
    torch.manual_seed(0)
    layer = make().requires_grad_(False)
    prune(layer.weight.flatten(1) if layer.weight.ndim == 4 else layer.weight)
    plain = copy.deepcopy(layer)
    x = torch.randn(3, 5, 40) if isinstance(layer, Conv1D) else torch.randn(2, layer.in_channels, 9, 11)
    optimize_for_inference(layer)
    got = layer(x)
    torch.testing.assert_close(got, plain(x), rtol=1e-5, atol=1e-5)
    assert set(inference_report(layer)[0].forms.values()) == {"singles"}
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
        got = layer(x)
        torch.testing.assert_close(got, plain(x), rtol=1e-5, atol=1e-5)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("always_sparse")
def test_bf16_sums_in_fp32() -> None:
    layer = sparse_linear(64, 48, 16).bfloat16()
    optimize_for_inference(layer)
    x = torch.randn(20, 64).bfloat16()
    got = layer(x)
    assert got.dtype is torch.bfloat16
    assert_close(got, x, layer.weight, layer.bias)


@pytest.mark.usefixtures("always_sparse")
def test_changed_weights_are_packed_anew() -> None:
    layer = sparse_linear(40, 48)
    optimize_for_inference(layer)
    x = torch.randn(3, 40)
    layer(x)
    other = sparse_linear(40, 48, 16)
    layer.load_state_dict({"weight": other.weight * 2, "bias": other.bias})
    assert_close(layer(x), x, other.weight * 2, other.bias)
    assert inference_report(layer)[0].pattern == "block:16x1"
    with torch.inference_mode():
        layer.weight.mul_(2)
        layer.bias.zero_()
    assert_close(layer(x), x, other.weight * 4, None)
    layer.weight = nn.Parameter(other.weight * 3, requires_grad=False)
    assert_close(layer(x), x, other.weight * 3, None)
    assert layer.double()(x.double()).dtype is torch.float64


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", ["strided", "expanded", "one", "other type"])
def test_a_bias_that_no_kernel_can_read_runs_dense(bias: str, dtype: torch.dtype) -> None:
    layer = sparse_linear(40, 48, 16).to(dtype)
    optimize_for_inference(layer)
    x = torch.randn(3, 40).to(dtype)
    run = product.direct(layer)  # type: ignore[arg-type]
    for _ in range(2):
        run(x)
    made = {
        "strided": torch.arange(96.0).to(dtype)[::2],
        "expanded": torch.ones(1).to(dtype).expand(48),
        "one": torch.ones(1).to(dtype),
        "other type": torch.ones(48, dtype=torch.float64),
    }[bias]
    for call in (layer, run):
        layer.bias.data = torch.zeros(48, dtype=dtype)
        call(x)
        layer.bias.data = made  # the same parameter
        if bias == "other type":
            with pytest.raises(RuntimeError, match="type"):
                layer(x)
        else:
            assert torch.equal(call(x), nn.functional.linear(x, layer.weight, made))
    fresh = sparse_linear(40, 48, 16).to(dtype)
    fresh.bias = nn.Parameter(made, requires_grad=False)
    choice.MEMORY.forget()
    choice.cache_file().unlink()
    optimize_for_inference(fresh, token_counts=[3])
    assert not choice.cache_file().exists()  # the time of nothing is not remembered


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("hidden", [True, False], ids=["data", "parameter"])
def test_a_weight_of_another_shape_or_type_is_packed_anew(hidden: bool) -> None:
    def give(module: Any, weight: Tensor) -> None:
        if hidden:
            module.weight.data = weight  # at the same address, and torch counts no change
        else:
            module.weight = nn.Parameter(weight, requires_grad=False)

    x = torch.randn(5, 40)
    layer = sparse_linear(10, 48).requires_grad_(False)
    optimize_for_inference(layer, token_counts=[1])
    layer(x[:, :10])
    give(layer, layer.weight.data.view(12, 40))
    layer.bias = None  # type: ignore[assignment]
    assert_close(layer(x), x, layer.weight, None)
    give(layer, layer.weight.data[:7])
    assert_close(layer(x), x, layer.weight, None)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x[:, :10])
    optimize_for_inference(layer, token_counts=[1, 4])
    give(layer, layer.weight.data.view(torch.bfloat16)[:, :40])
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    conv = nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
    prune(conv.weight.flatten(1))
    optimize_for_inference(conv)
    image = torch.randn(1, 16, 5, 5)
    conv(image)
    for weight in (conv.weight.data[:, :8].contiguous(), conv.weight.data[..., 1:, 1:].contiguous()):
        give(conv, weight)
        channels = image[:, : weight.shape[1]]
        want = nn.functional.conv2d(channels, weight, conv.bias, padding=1)
        torch.testing.assert_close(conv(channels), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # by torch's own forward_ad
@pytest.mark.parametrize("alone", [False, True], ids=["beside dense", "alone"])
def test_tangents_and_transforms_run_dense(alone: bool) -> None:
    layer = sparse_linear(40, 48)
    plain = copy.deepcopy(layer)
    optimize_for_inference(layer, keep_dense=not alone)
    x, tangent = torch.randn(3, 40), torch.randn(3, 40)
    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(got, tangent @ plain.weight.t())
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], tangent @ plain.weight.t())
    torch.testing.assert_close(torch.func.vmap(layer)(x), plain(x))
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), plain.weight.sum(0).expand(3, 40))


@pytest.mark.usefixtures("always_sparse")
def test_gradients_run_dense_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = sparse_linear(40, 48).requires_grad_(True)
    plain = copy.deepcopy(layer)
    optimize_for_inference(layer)
    x = torch.randn(3, 40)
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert layer.weight.grad is not None and plain.weight.grad is not None
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert [r.levelname for r in caplog.records if "Gradients are on" in r.message] == ["WARNING"]
    with torch.no_grad():
        assert layer(x).grad_fn is None


@pytest.mark.usefixtures("always_sparse")
def test_autocast_and_tracing_run_dense() -> None:
    layer = sparse_linear(40, 48)
    optimize_for_inference(layer)
    x = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    exported = torch.export.export(layer, (x,))
    assert_close(exported.module()(2 * x), 2 * x, layer.weight, layer.bias)


def test_restore_gives_the_same_modules_back() -> None:
    model = nn.Sequential(sparse_linear(40, 48, 16), nn.ReLU(), sparse_linear(48, 8))
    called: list[int] = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    modules, parameters = list(model.modules()), list(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert optimize_for_inference(model) is model
    assert isinstance(model[0], nn.Linear) and type(model[0]) is not nn.Linear
    model(torch.randn(2, 40))
    assert called
    assert list(model.state_dict()) == list(before)
    optimize_for_inference(model)  # again is no error
    assert restore(model) is model
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert type(model[0]) is nn.Linear and "gap_product" not in vars(model[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert inference_report(model) == []


@pytest.mark.usefixtures("always_sparse")
def test_copies_and_pickles_pack_their_own_weights() -> None:
    model = nn.Sequential(sparse_linear(40, 48, 16), sparse_linear(48, 8))
    optimize_for_inference(model)
    x = torch.randn(3, 40)
    want = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].bias.add_(1)
        twin[0].weight.mul_(1)
    torch.testing.assert_close(twin(x), want + 1)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)


def _child(call: Callable[[Tensor], Tensor], x: Tensor, num_threads: int, queue: Any) -> None:
    torch.set_num_threads(num_threads)
    with torch.inference_mode():
        queue.put(call(x).numpy())


def in_forked_child(call: Callable[[Tensor], Tensor], x: Tensor, num_threads: int) -> Tensor:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(call, x, num_threads, queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=60))
    process.join(timeout=60)
    return got


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.usefixtures("always_sparse")
def test_a_forked_child_and_threads() -> None:
    torch.set_num_threads(2)
    model = nn.Sequential(sparse_linear(64, 128, 16), sparse_linear(128, 64))
    optimize_for_inference(model)
    x = torch.randn(30, 64)
    with torch.inference_mode():
        want = model(x)
        found: list[Tensor] = []

        def work() -> None:
            with torch.inference_mode():
                found.extend(model(x) for _ in range(20))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 80
        for got in found:
            torch.testing.assert_close(got, want)

    torch.testing.assert_close(in_forked_child(model, x, 1), want)


# --- whole models -----------------------------------------------------------------------------------------------------


def sparse_model(model, rows: int = 16):
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            prune(module.weight, rows)
        if isinstance(module, Conv1D):
            prune(module.weight.t(), rows)
    return model.eval()


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("make", [toys.causal_lm, toys.seq2seq])
def test_generate_gives_the_same_tokens(make, tmp_path: Path) -> None:
    model = sparse_model(make())
    plain = copy.deepcopy(model)
    optimize_for_inference(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for batch, beams in ((1, 1), (3, 1), (2, 2)):
        ids = torch.randint(3, 60, (batch, 5), generator=torch.Generator().manual_seed(batch))
        options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert {form for layer in inference_report(model) for form in layer.forms.values()} == {"blocks"}
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.usefixtures("always_sparse")
def test_a_pipeline_gives_the_same_scores() -> None:
    import numpy as np
    from PIL import Image
    from transformers import ViTImageProcessor

    model = sparse_model(toys.image_classifier(), rows=1)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))

    def scores() -> list[float]:
        found = pipeline("image-classification", model=model, image_processor=processor)([image] * 3, batch_size=2)
        return [entry["score"] for entry in found[0]]

    want = scores()
    optimize_for_inference(model)
    assert scores() == pytest.approx(want, abs=1e-5)
    assert {"singles"} == {form for layer in inference_report(model) for form in layer.forms.values()}


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_the_faster_one_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse_linear(40, 48)
    measured: list[int] = []

    def fastest(runs) -> str:
        measured.append(len(runs))
        return choice.DENSE if len(measured) == 1 else "singles"

    monkeypatch.setattr(product, "fastest", fastest)
    optimize_for_inference(layer, token_counts=[1, 5])
    threads = torch.get_num_threads()
    assert measured == [1, 2]  # one token alone; both ends of 4 to 7
    (report,) = inference_report(layer)
    assert report.forms == {(threads, 1): "dense", (threads, 4): "singles"}
    x = torch.randn(6, 40)
    assert_close(layer(x), x, layer.weight, layer.bias)
    choice.MEMORY.forget()  # as a new process
    twin = sparse_linear(40, 48)
    optimize_for_inference(twin, token_counts=[1, 7])
    assert measured == [1, 2]
    assert inference_report(twin)[0].forms == report.forms


def test_one_thread_is_a_choice_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[set[str]] = []

    def fastest(runs) -> str:
        offered.append(set(runs[0]))
        return "blocks on 1 thread" if "blocks on 1 thread" in runs[0] else "blocks"

    monkeypatch.setattr(product, "fastest", fastest)
    layer = sparse_linear(40, 48, 16)
    x = torch.randn(1, 40)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        optimize_for_inference(layer, token_counts=[1])
        assert_close(layer(x), x, layer.weight, layer.bias)
        used = inference_report(layer)[0].forms[threads, 1]
        assert used == ("blocks on 1 thread" if threads == 2 else "blocks")
    assert offered == [{"dense", "blocks"}, {"dense", "blocks", "blocks on 1 thread"}]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 1}', '{"version": 1, "choices": [1]}', '{"version": 99}', "\x00"]
)
def test_a_damaged_file_of_choices_is_ignored(text: str) -> None:
    path = choice.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert choice.Memory().get("key", ("singles",)) is None
    memory = choice.Memory()
    memory.set("key", "singles")
    assert json.loads(path.read_text(encoding="utf-8"))["choices"] == {"key": "singles"}
    assert choice.Memory().get("key", ("singles",)) == "singles"
    assert choice.Memory().get("key", ("blocks",)) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GAP_HF_CACHE", str(tmp_path / "file" / "below"))
    memory = choice.Memory()
    memory.set("key", "singles")
    assert memory.get("key", ("singles",)) == "singles"


def test_no_home_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    choice.MEMORY.set("key", "blocks")
    assert choice.MEMORY.get("key", ("blocks",)) == "blocks"
    monkeypatch.delenv("GAP_HF_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    assert choice.MEMORY.get("key", ("blocks",)) is None  # known in another folder
    layer = sparse_linear(40, 48)
    optimize_for_inference(layer, token_counts=[1])
    layer(torch.randn(1, 40))
    choice.MEMORY.set("key", "blocks")
    assert choice.MEMORY.get("key", ("blocks",)) == "blocks"  # in this process
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_is_slower_at_one_end_of_a_range_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [{"dense": 1.0, "a": 0.5, "b": 0.8}, {"dense": 1.0, "a": 1.1, "b": 0.8}]
    runs = [dict.fromkeys(share, int) for share in shares]
    monkeypatch.setattr(
        choice, "_shares_of_dense", lambda run: next(s for s, r in zip(shares, runs, strict=True) if r is run)
    )
    assert choice.fastest(runs) == "b"
    assert choice.fastest(runs[:1]) == "a"
    assert choice.fastest(runs[1:]) == "b"
    shares[1]["b"] = 0.97
    assert choice.fastest(runs) == "dense"


def test_every_token_count_has_a_range_with_ends_in_it() -> None:
    for tokens in range(1, 3000):
        range_ = choice.range_of(tokens)
        assert all(choice.range_of(end) == range_ for end in choice.ends_of(range_))
        assert min(choice.ends_of(range_)) <= tokens


# --- refusals and fallbacks -------------------------------------------------------------------------------------------


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GaPError, match=r"the sparsest layer, '0', has \d+ % zeros; expected at least 50 %"):
        optimize_for_inference(nn.Sequential(sparse_linear(20, 20, sparsity=0.3)))
    with pytest.raises(GaPError, match="no Linear, Conv1D or Conv2d"):
        optimize_for_inference(nn.Sequential(nn.LayerNorm(3)))
    model = nn.Sequential(sparse_linear(20, 20))
    with monkeypatch.context() as patch:
        patch.setattr(optimize, "MIN_WEIGHTS", 401)
        with pytest.raises(GaPError, match="no Linear, Conv1D or Conv2d of at least 401 weights"):
            optimize_for_inference(model)
    with pytest.raises(GaPError, match=r"token_counts: found \[0\], expected numbers of at least 1"):
        optimize_for_inference(model, token_counts=[0])
    with pytest.raises(GaPError, match=r"did you mean '0\.weight'"):
        optimize_for_inference(model, masks={"1.weight": torch.ones(20, 20)})
    with pytest.raises(GaPError, match=r"masks\['0.weight'\] has shape \(3, 3\), its weight \(20, 20\)"):
        optimize_for_inference(model, masks={"0.weight": torch.ones(3, 3)})
    with pytest.raises(GaPError, match=r"'0\.weight' has \d+ masked weights that are not 0"):
        optimize_for_inference(model, masks={"0.weight": torch.zeros(20, 20)})
    assert type(model[0]) is nn.Linear


def test_masks_say_which_layers() -> None:
    model = nn.Sequential(sparse_linear(20, 20), sparse_linear(20, 20))
    optimize_for_inference(model, masks={"1.weight": (model[1].weight != 0).to(torch.uint8)})
    assert [report.name for report in inference_report(model)] == ["1"]


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("how", ["missing", "failing"])
def test_without_llvmlite_there_is_one_warning(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled._llvm.cache_clear()
    compiled._compile.cache_clear()
    with monkeypatch.context() as patch:
        if how == "missing":
            patch.setitem(sys.modules, "llvmlite.binding", None)
        else:

            def fail(*args, **kwargs):
                raise RuntimeError("no target")

            patch.setattr("llvmlite.binding.parse_assembly", fail)
        model = nn.Sequential(sparse_linear(64, 128, 16), sparse_linear(128, 64))
        plain = copy.deepcopy(model)
        optimize_for_inference(model)
        for tokens in (1, 5, 40):
            x = torch.randn(tokens, 64)
            torch.testing.assert_close(model(x), plain(x))
        used = {form for layer in inference_report(model) for form in layer.forms.values()}
    compiled._llvm.cache_clear()
    compiled._compile.cache_clear()
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [("llvmlite" in r.message, "gap_hf[inference]" in r.message) for r in warnings] == [(True, True)]
    assert "blocks" not in used and "singles" not in used
    assert used >= ({"gathered blocks", "torch csr"} if how == "missing" else {"torch csr"})


def test_modules_of_others_are_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    mine = Mine(20, 20).requires_grad_(False)
    prune(mine.weight)
    grouped = nn.Conv2d(8, 8, 3, groups=2).requires_grad_(False)
    prune(grouped.weight.flatten(1))
    hooked = sparse_linear(20, 20)
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(GaPError, match="no Linear, Conv1D or Conv2d"):
        optimize_for_inference(nn.ModuleList([mine, grouped]))
    with pytest.raises(GaPError, match=r"has a forward of its own, .* '0' is the first"):
        optimize_for_inference(nn.ModuleList([hooked, mine]))


@pytest.mark.usefixtures("always_sparse")
def test_weights_that_are_offloaded_afterwards_are_not_held(caplog: pytest.LogCaptureFixture) -> None:
    layers = nn.Sequential(sparse_linear(40, 48, 16), sparse_linear(48, 40))
    x = torch.randn(3, 40)
    optimize_for_inference(layers)
    with torch.no_grad():
        want = layers(x)
    assert all(layer.gap_product.packed is not None for layer in layers)  # type: ignore[union-attr]
    add_hook_to_module(layers[0], AlignDevicesHook(execution_device="cpu"))
    with torch.no_grad():
        torch.testing.assert_close(layers(x), want)
    assert layers[0].gap_product.packed is not None  # the hook leaves the weight where it is
    remove_hook_from_module(layers[0])
    cpu_offload(layers, execution_device=torch.device("cpu"))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(layers(x), want)
        assert all(layer.gap_product.packed is None for layer in layers)  # type: ignore[union-attr]
    assert not inference_report(layers)
    assert "are offloaded, so these layers run dense" in caplog.text


def test_a_layer_without_any_form_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "fastest", lambda runs: pytest.fail("measured"))
    layer = sparse_linear(40, 48).half()
    optimize_for_inference(layer, token_counts=[1])
    assert [set(report.forms.values()) for report in inference_report(layer)] == [{"dense"}]
    assert not choice.cache_file().exists()


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("rows", [1, 16])
def test_the_default_device_does_not_matter(rows: int) -> None:
    layer = sparse_linear(40, 48, rows)
    x = torch.randn(5, 40)
    want = layer(x)
    with torch.device("meta"):  # where a CPU layer's arrays must not be, no more than on a GPU
        optimize_for_inference(layer)
        torch.testing.assert_close(layer(x), want)


def test_random_numbers_are_not_touched() -> None:
    layer = sparse_linear(40, 48)
    torch.manual_seed(3)
    optimize_for_inference(layer, token_counts=[1, 40])
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_a_new_process_compiles_once_more(tmp_path: Path) -> None:
    layer = sparse_linear(40, 48, 16)
    optimize_for_inference(layer)
    torch.save(layer, tmp_path / "layer.pt")
    code = (
        "import sys, torch; layer = torch.load(sys.argv[1], weights_only=False); x = torch.ones(2, 40)\n"
        "from gap_hf import restore\n"
        "out = layer(x); torch.testing.assert_close(out, restore(layer)(x)); print(type(layer).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "layer.pt")], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["Linear"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_on_a_gpu(dtype: torch.dtype) -> None:
    layer = two_of_four_layer().to("cuda", dtype)
    plain = copy.deepcopy(layer)
    optimize_for_inference(layer, token_counts=[64])
    packed = layer.gap_product.packed
    form = packed.form("2:4 tensor cores", layer.weight)
    assert form is not None
    for tokens in (1, 3, 64):
        x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
        torch.testing.assert_close(form(x, layer.bias, 1), plain(x), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-2, atol=1e-2)  # whichever was faster


def two_of_four_layer() -> nn.Linear:
    """Two of four in places of their own in each row: whole columns would be blocks, which are found first."""
    layer = nn.Linear(256, 256).requires_grad_(False)
    draw = torch.rand(256, 64, 4, generator=torch.Generator().manual_seed(0))
    layer.weight.mul_((draw.argsort(-1) < 2).view(256, 256))
    return layer


def test_two_of_four_is_seen() -> None:
    layer = two_of_four_layer()
    optimize_for_inference(layer)
    assert layer.gap_product.packed.structure.pattern == "2:4"
