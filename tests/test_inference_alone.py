"""Live weights alone: dense weights are given up, and everything that asks for one gets what it was, to the bit."""

from __future__ import annotations

import copy
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from test_inference import fresh, prune  # noqa: F401  # a fixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gap_hf import GaPError, inference_report, optimize_for_inference, restore
from gap_hf.inference import compiled
from gap_hf.inference.alone import AloneConv1D, AloneLinear
from gap_hf.inference.layers import SparseLinear
from tests import toys

pytestmark = pytest.mark.usefixtures("fresh")


def model_of(rows: int = 1, sparsity: float = 0.9) -> nn.Sequential:
    """An odd number of outputs where there are no blocks; the second layer lies the other way round."""
    torch.manual_seed(0)
    wide = 48 if rows > 1 else 43
    model = nn.Sequential(nn.Linear(40, wide), nn.GELU(), Conv1D(48, wide), nn.Linear(48, 8)).requires_grad_(False)
    prune(model[0].weight, rows, sparsity)  # type: ignore[arg-type]
    prune(model[2].weight.t(), rows, sparsity, seed=1)  # type: ignore[operator]
    return model.eval()


def parameters_in_memory(model: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


def held(model: nn.Module) -> int:
    """Bytes of what products hold."""
    forms = [m.gap_product.form for m in model.modules() if isinstance(m, AloneLinear | AloneConv1D)]
    return sum(a.numel() * a.element_size() for form in forms for a in form.arrays)


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_weights_are_what_they_were(rows: int, dtype: torch.dtype) -> None:
    model = model_of(rows).to(dtype)
    before = copy.deepcopy(model.state_dict())
    inputs = [torch.randn(tokens, 40).to(dtype) for tokens in (1, 2, 7, 65, 300)]
    want = [model(x) for x in inputs]
    dense = parameters_in_memory(model)
    assert optimize_for_inference(model, keep_dense=False) is model
    assert [type(m) for m in model] == [AloneLinear, nn.GELU, AloneConv1D, nn.Linear]
    assert parameters_in_memory(model) < 0.35 * dense  # the last layer is dense
    for x, y in zip(inputs, want, strict=True):
        torch.testing.assert_close(model(x), y, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-2)
    assert toys.same_tensors(dict(model.state_dict()), dict(before))
    forms = [set(report.forms.values()) for report in inference_report(model)]
    assert forms == [{"blocks" if rows > 1 else "singles"}] * 2
    restore(model)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, Conv1D, nn.Linear]
    assert toys.same_tensors(dict(model.state_dict()), dict(before))
    assert all(not p.requires_grad for p in model.parameters())
    for x, y in zip(inputs, want, strict=True):
        assert torch.equal(model(x), y)


def test_what_is_held_is_an_eighth_of_the_dense_weight() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    prune(model[0].weight, 16)  # type: ignore[arg-type]
    optimize_for_inference(model, keep_dense=False)
    assert held(model) < 0.11 * 4 * 1024**2  # a value for each live weight, an input for each block
    singles = nn.Sequential(nn.Linear(1024, 1024))
    prune(singles[0].weight)  # type: ignore[arg-type]
    optimize_for_inference(singles, keep_dense=False)
    assert held(singles) < 0.18 * 4 * 1024**2  # slices are as long as their fullest output


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_gives_what_dense_gives(bad: float) -> None:
    model = model_of()
    x = torch.randn(5, 40)
    x[1, 2] = bad
    want = model[0](x)
    optimize_for_inference(model, keep_dense=False)
    torch.testing.assert_close(model[0](x), want, equal_nan=True)


def test_gradients_and_autocast_run_dense() -> None:
    model = model_of()
    x = torch.randn(5, 40, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).sum(), x)
    optimize_for_inference(model, keep_dense=False)
    (got,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype is torch.bfloat16


def test_copies_pickles_and_moves() -> None:
    model = model_of(8)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 40)
    want = model(x)
    optimize_for_inference(model, keep_dense=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):  # written a line above
        assert type(other[0]) is nn.Linear and type(other[2]) is Conv1D
        assert toys.same_tensors(dict(other.state_dict()), dict(before))
        assert torch.equal(other(x), want)
    assert model.to("cpu") is model and type(model[0]) is AloneLinear
    torch.testing.assert_close(model(x), want)
    model.bfloat16()
    assert type(model[0]) is AloneLinear and model(x.bfloat16()).dtype is torch.bfloat16
    model.double()
    assert type(model[0]) is nn.Linear and model(x.double()).dtype is torch.float64


def test_weights_that_are_loaded_or_put_there_count() -> None:
    model, other = model_of(8), model_of(8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    optimize_for_inference(model, keep_dense=False)
    model.load_state_dict(other.state_dict())
    x = torch.randn(3, 40)
    assert torch.equal(model(x), other(x))
    optimize_for_inference(model, keep_dense=False)
    model[0].weight = nn.Parameter(torch.ones(48, 40))
    assert torch.equal(model[0](x), nn.functional.linear(x, torch.ones(48, 40), model[0].bias))  # type: ignore[arg-type]
    assert torch.equal(model.state_dict()["0.weight"], torch.ones(48, 40))


def test_a_weight_that_was_moved_past_the_layer_is_refused() -> None:
    model = optimize_for_inference(model_of(8), keep_dense=False)
    set_module_tensor_to_device(model[0], "weight", "meta")
    set_module_tensor_to_device(model[0], "weight", "cpu", value=torch.full((48, 40), torch.nan))
    with pytest.raises(GaPError, match="dispatch_model"):
        model(torch.randn(3, 40))


def fill_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.fill_(0.5)


def put_behind(weight: nn.Parameter) -> None:
    weight.data = torch.ones(weight.shape)


def put_behind_twice(weight: nn.Parameter) -> None:
    for _ in range(2):  # where what was there at first may be freed, and its address used again
        weight.data = torch.ones(1).expand(weight.shape)


def put_there_in_another_type(weight: nn.Parameter) -> None:
    weight.data = torch.ones(weight.shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    "change", [fill_in_place, put_behind, put_behind_twice, put_there_in_another_type, lambda w: w.zero_()]
)
def test_a_weight_that_is_changed_through_its_parameter_counts(change: Any, layer: int) -> None:
    model = optimize_for_inference(model_of(8), keep_dense=False)
    changed: Any = model[layer]
    change(changed.weight)
    want = changed.weight.detach().clone()
    x = torch.randn(3, 40 if layer == 0 else 48)
    matrix = want.t() if layer else want
    if want.dtype is torch.bfloat16:
        with pytest.raises(RuntimeError, match="type"):  # as dense does
            changed(x)
        changed.bias.data = changed.bias.data.bfloat16()
        x = x.bfloat16()
    for _ in range(2):
        torch.testing.assert_close(changed(x), nn.functional.linear(x, matrix, changed.bias))
    assert torch.equal(model.state_dict()[f"{layer}.weight"], want)
    assert torch.equal(copy.deepcopy(model)[layer].weight, want)  # type: ignore[index]
    parameter = changed.weight
    restore(model)
    assert changed.weight is parameter and torch.equal(parameter, want)
    with torch.no_grad():
        parameter[0, 0] = 7  # every number has its place again
    assert int((parameter != want).sum()) == 1


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_type_that_was_changed_past_the_layer_is_refused(tokens: int) -> None:
    model = optimize_for_inference(model_of(8), keep_dense=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(GaPError, match=r"converted by copying its parameter.*; expected model\.to\("):
        model(torch.randn(tokens, 40).bfloat16())


def test_a_placeholder_that_is_made_under_inference_mode_counts_its_changes() -> None:
    with torch.inference_mode():
        model = optimize_for_inference(model_of(8), keep_dense=False)
        model[0].weight.zero_()  # type: ignore[operator]
        x = torch.randn(3, 40)
        assert torch.equal(model[0](x), model[0].bias.expand(3, 48))  # type: ignore[operator]


@pytest.mark.parametrize("rows", [1, 8])
def test_weights_get_the_gradients_that_dense_gives(rows: int) -> None:
    model = model_of(rows).requires_grad_(True)
    x = torch.randn(5, 40)
    names = [name for name, _ in model.named_parameters()]
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    optimize_for_inference(model, keep_dense=False)
    model(x).square().sum().backward()
    for name, gradient in zip(names, want, strict=True):
        found = model.get_parameter(name).grad
        assert found is not None, name
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in restore(model).parameters())


def test_under_torch_compile_weights_are_made_and_changes_are_seen() -> None:
    layer: Any = model_of(8)[0].requires_grad_(True)
    x = torch.randn(5, 40)
    want = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    optimize_for_inference(layer, keep_dense=False)
    run = torch.compile(layer, backend="eager")
    torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), layer.weight), want)
    with torch.no_grad():
        layer.weight.zero_()
        assert torch.equal(run(x), layer.bias.expand(5, 48))


def test_a_weight_that_is_lent_is_not_held() -> None:
    model = optimize_for_inference(model_of(8), keep_dense=False)
    weights = [torch.ones(48, 40), torch.zeros(48, 40)]
    for weight in weights:
        model[0].weight = nn.Parameter(weight)
        lent = weakref.ref(model[0].weight)
        assert torch.isfinite(model(torch.randn(3, 40))).all()
    model[0].weight = nn.Parameter(torch.ones(48, 40))
    assert lent() is None


@pytest.mark.parametrize("rows", [1, 8])
def test_the_default_device_does_not_matter(rows: int) -> None:
    model = model_of(rows)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 40)
    want = model(x)
    with torch.device("meta"):
        optimize_for_inference(model, keep_dense=False)
        torch.testing.assert_close(model(x), want)
        assert toys.same_tensors(dict(model.state_dict()), dict(before))


def test_whoever_reads_the_weight_past_the_layer_gets_nan() -> None:
    model = optimize_for_inference(model_of(), keep_dense=False)
    weight: Any = model[0].weight
    assert weight.shape == (43, 40) and weight.dtype is torch.float32 and weight.device.type == "cpu"
    assert bool(weight.isnan().all())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model_of().parameters())


def test_once_more_and_back_to_keeping() -> None:
    model = model_of(8)
    before = copy.deepcopy(model.state_dict())
    for keep in (False, False, True, False):
        optimize_for_inference(model, keep_dense=keep)
        assert (type(model[0]) is AloneLinear) is not keep
    assert toys.same_tensors(dict(model.state_dict()), dict(before))


def test_masks_are_looked_for_in_weights_that_are_made_anew() -> None:
    model = model_of(8)
    before, masks = copy.deepcopy(model.state_dict()), {"0.weight": (model[0].weight != 0).to(torch.uint8)}  # type: ignore[union-attr, operator]
    for _ in range(2):
        optimize_for_inference(model, masks=masks, keep_dense=False)
        assert type(model[0]) is AloneLinear and type(model[2]) is Conv1D
    optimize_for_inference(model, keep_dense=False)
    weight = model[0].weight
    with pytest.raises(GaPError, match="masked weights that are not 0"):
        optimize_for_inference(model, masks={"0.weight": torch.zeros(48, 40)})
    with pytest.raises(GaPError, match="decode_step: Sequential does not generate"):
        optimize_for_inference(model, decode_step="exported")
    assert model[0].weight is weight and bool(weight.isnan().all())  # type: ignore[union-attr, operator]  # nothing was touched
    optimize_for_inference(model, masks=masks)
    assert [type(m) for m in model] == [SparseLinear, nn.GELU, Conv1D, nn.Linear]
    assert toys.same_tensors(dict(model.state_dict()), dict(before))


def test_shared_weights_are_kept() -> None:
    model = model_of(8)
    twin = nn.Linear(40, 48)
    twin.weight = model[0].weight  # type: ignore[assignment]
    both = nn.ModuleList([model, twin])
    optimize_for_inference(both, keep_dense=False)
    assert type(model[0]) is not AloneLinear and type(model[2]) is AloneConv1D
    x = torch.randn(3, 40)
    torch.testing.assert_close(model[0](x) - model[0].bias, twin(x) - twin.bias)  # type: ignore[operator]


def sparse_lm() -> Any:
    model = toys.causal_lm(n_embd=32).eval()
    for name, parameter in model.named_parameters():
        if ".h." in name and parameter.ndim == 2:
            prune(parameter.t(), 8)  # GPT-2's layers lie the other way round
    return model


def test_a_model_generates_saves_and_serves(tmp_path: Path) -> None:
    model = sparse_lm()
    tokens = torch.arange(5, 13)[None]
    want = model.generate(tokens, max_new_tokens=6, do_sample=False)
    weights = copy.deepcopy(model.state_dict())
    optimize_for_inference(model, keep_dense=False)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), want)
    model.save_pretrained(tmp_path)
    assert toys.same_tensors(dict(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()), dict(weights))
    model.to("cpu")  # as a pipeline does
    assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), want)


def test_without_a_compiler_it_is_refused_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_llvm", lambda: None)
    model = model_of(8)
    before: dict[str, Tensor] = copy.deepcopy(model.state_dict())
    with pytest.raises(GaPError, match=r"keep_dense: found False, which needs the kernels"):
        optimize_for_inference(model, keep_dense=False)
    assert type(model[0]) is nn.Linear and toys.same_tensors(dict(model.state_dict()), before)
