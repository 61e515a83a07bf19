"""Training with sparse products: what dense masked training computes, to rounding, and dense wherever that could not be."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import CONFIG, Tokens, assert_masked_weights_are_zero, causal_lm, gap_trainer, same_tensors
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from gap_hf import GaPConfig, GaPError, GaPTrainer, Sparsifier, sparse_compute
from gap_hf import sparse_layers as layers
from gap_hf.inference import compiled
from gap_hf.sparse_products import Products

SPARSE = CONFIG.replace(sparse_compute=True)
BLOCKS = CONFIG.replace(sparse_compute=True, pattern="block:8x1", sparsity=0.75)
RIGL = GaPConfig(
    sparsity=0.9, method="rigl", update_steps=4, drop_fraction=0.5, fine_tune_share=0.2, sparse_compute=True
)


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toys' layers are small."""
    monkeypatch.setattr(layers, "MIN_WEIGHTS", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each product ran, and how often it was left to dense."""
    counts = dict.fromkeys(("output", "input_gradient", "weight_gradient", "dense"), 0)

    def counted(name: str) -> Any:
        original = getattr(Products, name)

        def call(self: Products, *args: Any) -> Tensor | None:
            out = original(self, *args)
            counts["dense" if out is None else name] += 1
            return out

        return call

    for name in ("output", "input_gradient", "weight_gradient"):
        monkeypatch.setattr(Products, name, counted(name))
    return counts


def random_mask(num_out: int, num_in: int, rows: int, density: float, seed: int = 0) -> Tensor:
    """uint8, at least one entry of each kind."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(num_out // rows, num_in, generator=generator) < density
    drawn.view(-1)[0], drawn.view(-1)[-1] = True, False
    return drawn.repeat_interleave(rows, dim=0).to(torch.uint8)


def assert_close(got: Tensor, want: Tensor, magnitude: Tensor) -> None:
    """Within the rounding of a sum of so many products in fp32."""
    error = (got.double() - want).abs()
    assert bool((error <= 8 * torch.finfo(torch.float32).eps * magnitude + 1e-30).all()), float(error.max())


@settings(deadline=None, max_examples=40)
@given(
    rows=st.sampled_from([1, 8, 16, 32]),
    groups=st.integers(1, 9),
    num_in=st.integers(2, 70),
    tokens=st.integers(1, 130),
    density=st.sampled_from([0.02, 0.1, 0.14]),
    turned=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_products_are_denses(
    rows: int, groups: int, num_in: int, tokens: int, density: float, turned: bool, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    num_out = rows * groups if rows > 1 else groups + 1
    mask = random_mask(num_out, num_in, rows, density, seed)
    generator = torch.Generator().manual_seed(seed)
    x, gy = torch.randn(tokens, num_in, generator=generator), torch.randn(tokens, num_out, generator=generator)
    bias, matrix = torch.randn(num_out, generator=generator), torch.randn(num_out, num_in, generator=generator) * mask
    stored = (matrix.t().contiguous(), mask.t().contiguous().t()) if turned else (matrix, mask)
    weight, products = stored[0], Products(stored[1])
    big = [t.double() for t in (x, gy, matrix, bias)]
    y, gx = products.output(x, weight, bias), products.input_gradient(gy, weight)
    of_weight = products.weight_gradient(gy, x, weight)
    if y is None or gx is None or of_weight is None:
        assert float(mask.float().mean()) > 0.15, "a product was left to dense that few weights are live in"
        return
    assert_close(y, big[0] @ big[2].t() + big[3], big[0].abs() @ big[2].t().abs() + big[3].abs())
    assert_close(gx, big[1] @ big[2], big[1].abs() @ big[2].abs())
    got = of_weight.t() if turned else of_weight
    assert_close(got, (big[1].t() @ big[0]) * mask, big[1].t().abs() @ big[0].abs())
    assert bool((got[mask == 0] == 0).all())


def test_what_too_much_is_live_for_is_left_to_dense() -> None:
    x, gy = torch.randn(40, 64), torch.randn(40, 64)
    for density, expected in ((0.1, (True, True, True)), (0.2, (True, True, False)), (0.5, (False, False, False))):
        mask = random_mask(64, 64, 1, density)
        weight, products = torch.randn(64, 64) * mask, Products(mask)
        results = (
            products.output(x, weight, None),
            products.input_gradient(gy, weight),
            products.weight_gradient(gy, x, weight),
        )
        assert tuple(result is not None for result in results) == expected


def test_the_number_of_threads_changes_nothing() -> None:
    mask = random_mask(96, 80, 16, 0.2)
    weight, x, gy = torch.randn(96, 80) * mask, torch.randn(200, 80), torch.randn(200, 96)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        products = Products(mask)
        found.append(
            (
                products.output(x, weight, None),
                products.input_gradient(gy, weight),
                products.weight_gradient(gy, x, weight),
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("lanes", "registers"), [(16, 32), (4, 32)], ids=["avx512", "neon"])
@pytest.mark.parametrize("rows", [1, 16])
def test_kernels_that_are_written_for_other_registers(
    rows: int, lanes: int, registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM cuts their vectors to what this CPU has; what they compute has to be the same."""
    kernels = pytest.importorskip("gap_hf.inference.kernels", reason="needs llvmlite")
    features = compiled._machine(compiled._llvm())[1]
    monkeypatch.setattr(compiled, "_machine", lambda llvm: (kernels.Machine(lanes, registers), features))
    compiled._compile.cache_clear()
    try:
        mask = random_mask(48, 41, rows, 0.14)
        x, gy, weight = torch.randn(75, 41), torch.randn(75, 48), torch.randn(48, 41) * mask
        products = Products(mask)
        found = products.output(x, weight, None), products.input_gradient(gy, weight)
        torch.testing.assert_close(found, (x @ weight.t(), gy @ weight), rtol=1e-4, atol=1e-4)
        of_weight = products.weight_gradient(gy, x, weight)
        torch.testing.assert_close(of_weight, (gy.t() @ x) * mask, rtol=1e-4, atol=1e-4)
    finally:
        compiled._compile.cache_clear()


# --- layers ----------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A Linear and a Conv1D, which lie the other way round."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64, bias=bias), Conv1D(40, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def two(rows: int = 1, sparsity: float = 0.9, *, bias: bool = True) -> tuple[Two, Sparsifier]:
    """Both layers sparse, no phases to come."""
    torch.manual_seed(0)
    model = Two(bias=bias)
    pattern = "unstructured" if rows == 1 else f"block:{rows}x1"
    config = GaPConfig(sparsity=sparsity, method="static", pattern=pattern, include=("*",))
    sparsifier = Sparsifier(model, config, total_steps=10)
    sparsifier.start()
    assert all(sparsifier.masks[name] is not None for name in ("first.weight", "second.weight"))
    return model, sparsifier


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a loss that is not linear in the output, and of the input; the output itself."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"input": x.grad, "output": y.detach(), **{name: grad.clone() for name, grad in found.items()}}


def assert_same_but_for_masked(got: dict[str, Tensor], want: dict[str, Tensor], sparsifier: Sparsifier) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        mask = sparsifier.masks[name] if name in sparsifier.masks.params else None
        torch.testing.assert_close(got[name], value if mask is None else value * mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_give_denses_outputs_and_gradients(rows: int, bias: bool, calls: dict[str, int]) -> None:
    model, sparsifier = two(rows, bias=bias)
    for shape in [(33, 48), (4, 20, 48), (2, 3, 17, 48)]:
        x = torch.randn(shape)
        want = gradients(model, x)
        with sparse_compute(sparsifier):
            assert_same_but_for_masked(gradients(model, x), want, sparsifier)
    assert calls == {"output": 6, "input_gradient": 6, "weight_gradient": 6, "dense": 0}


def test_a_bias_that_no_kernel_can_read_runs_dense() -> None:
    model, sparsifier = two()
    x = torch.randn(40, 48)
    for bias in (torch.arange(128.0)[::2], torch.ones(1).expand(64), torch.ones(1)):
        model.first.bias = nn.Parameter(bias)
        want = gradients(model, x)
        with sparse_compute(sparsifier):
            got = gradients(model, x)
        del got["first.weight"], want["first.weight"]  # whole
        assert_same_but_for_masked(got, want, sparsifier)


def test_inputs_of_any_layout_and_gradients_that_are_not_asked_for(calls: dict[str, int]) -> None:
    model, sparsifier = two()
    turned = torch.randn(48, 60).t()
    want = gradients(model, turned)
    with sparse_compute(sparsifier):
        assert_same_but_for_masked(gradients(model, turned), want, sparsifier)
        model.zero_grad()
        model(turned).sum().backward()  # an input that needs none
        assert calls["input_gradient"] == 3
        model.first.weight.requires_grad_(False)
        model.zero_grad()
        model(turned).sum().backward()
        assert model.first.weight.grad is None and model.second.weight.grad is not None
        with torch.inference_mode():
            result = model(turned)
    torch.testing.assert_close(result, model(turned), rtol=1e-4, atol=1e-5)


def test_masks_of_any_layout_and_optimizers_that_write_past_the_version_counter(calls: dict[str, int]) -> None:
    model, sparsifier = two()
    for name in sparsifier.masks:
        mask = sparsifier.masks[name]
        assert mask is not None
        sparsifier.masks.set(name, mask.t().contiguous().t())
    x = torch.randn(40, 48)
    with sparse_compute(sparsifier):
        model(x)
        for parameter in model.parameters():
            parameter.data.add_(0.1)  # as some optimizers do
        sparsifier.mask_weights()
        got = gradients(model, x)
    assert calls["output"] == 4
    assert_same_but_for_masked(got, gradients(model, x), sparsifier)


def test_weights_are_followed_and_a_change_before_backward_is_an_error() -> None:
    model, sparsifier = two()
    x = torch.randn(40, 48)
    with sparse_compute(sparsifier):
        gradients(model, x)
        with torch.no_grad():
            model.first.weight.mul_(2)
        got = gradients(model, x)
        y = model(x)
        with torch.no_grad():
            model.second.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        with torch.no_grad():
            model.second.weight.div_(2)
    assert_same_but_for_masked(got, gradients(model, x), sparsifier)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_run_dense(bad: float) -> None:
    model, sparsifier = two()
    x = torch.randn(40, 48)
    x[3, 5] = bad
    y = model.first(x)
    with sparse_compute(sparsifier):
        torch.testing.assert_close(model.first(x), y, equal_nan=True)
        x[3, 5] = 0
        z, loss = model.first(x), torch.ones(40, 64)
        loss[2, 7] = bad
        z.backward(loss)
    want = torch.autograd.grad(model.first(x), model.first.weight, loss)[0]
    mask = sparsifier.masks["first.weight"]
    assert mask is not None and model.first.weight.grad is not None
    live = mask == 1
    torch.testing.assert_close(model.first.weight.grad[live], want[live], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_dense_runs_where_sparse_must_not(calls: dict[str, int]) -> None:
    model, sparsifier = two()
    few, x = torch.randn(31, 48), torch.randn(40, 48)
    with sparse_compute(sparsifier):
        assert torch.equal(model.first(few), nn.functional.linear(few, model.first.weight, model.first.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
        assert model(torch.empty(0, 48)).shape == (0, 40)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(40, 47))
        compiled_model: Any = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled_model(x), model.second(torch.tanh(model.first(x))))
        assert calls["output"] == 2  # those of the line above
        model.double()
        assert model(x.double()).dtype is torch.float64
    assert sum(calls.values()) == 2


def test_copies_and_pickles_are_ordinary() -> None:
    model, sparsifier = two()
    x = torch.randn(40, 48)
    with sparse_compute(sparsifier):
        model(x)
        twin = copy.deepcopy(model)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        file = io.BytesIO()
        torch.save(model, file)
        assert type(model.first) is not nn.Linear
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # written a line above
    for other in (twin, averaged.module, loaded, model):
        assert type(other.first) is nn.Linear and type(other.second) is Conv1D
        assert not hasattr(other.first, "gap_product")
        assert same_tensors(dict(other.state_dict()), dict(model.state_dict()))


def test_what_is_not_ours_to_change_stays_dense() -> None:
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(Own(48, 64), nn.Linear(64, 48), nn.Linear(48, 48))
    model[1].forward = model[1].forward  # as accelerate's hooks do
    config = GaPConfig(sparsity=0.9, method="static", include=("*",))
    sparsifier = Sparsifier(model, config, total_steps=10)
    sparsifier.start()
    assert layers.install(sparsifier) == ["2.weight"]
    assert layers.install(sparsifier) == ["2.weight"], "a second time"
    layers.remove(model)
    assert [type(module) for module in model] == [Own, nn.Linear, nn.Linear]


# --- training --------------------------------------------------------------------------------------------------------


def run(folder: Path, config: GaPConfig, **changes: Any) -> GaPTrainer:
    values = {"max_steps": 24, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, **changes}
    trainer = gap_trainer(folder, config=config, model=causal_lm(n_embd=32), **values)
    trainer.train()
    return trainer


def assert_agree(a: GaPTrainer, b: GaPTrainer) -> None:
    assert a.gap is not None and b.gap is not None
    assert a.gap.masks.digest() == b.gap.masks.digest()
    weights: Any = b.model.state_dict()  # type: ignore[union-attr]
    for name, weight in a.model.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "live_state", "accumulation"),
    [(SPARSE, False, 2), (SPARSE, True, 1), (BLOCKS, True, 2)],
    ids=["single weights", "single weights, live state", "blocks, live state"],
)
def test_a_run_is_masked_dense_trainings_to_rounding(
    tmp_path: Path, config: GaPConfig, live_state: bool, accumulation: int, calls: dict[str, int]
) -> None:
    changes = {"gradient_accumulation_steps": accumulation}
    sparse = run(tmp_path, config.replace(live_state=live_state), **changes)
    assert min(calls["output"], calls["input_gradient"], calls["weight_gradient"]) > 100 * accumulation
    dense = run(tmp_path, config.replace(sparse_compute=False), **changes)
    assert_agree(sparse, dense)
    assert_masked_weights_are_zero(sparse)
    assert {type(m).__name__ for m in sparse.model.modules()} == {type(m).__name__ for m in dense.model.modules()}  # type: ignore[union-attr]


def test_three_hundred_steps_clipped_and_decayed(tmp_path: Path) -> None:
    """Three changes of masks and more; the rate is small enough for rounding not to grow."""
    changes = {"max_steps": 300, "max_grad_norm": 1.0, "weight_decay": 0.01, "logging_steps": 50}
    sparse = run(tmp_path, BLOCKS.replace(live_state=True), **changes)
    assert_agree(sparse, run(tmp_path, BLOCKS.replace(sparse_compute=False), **changes))
    assert_masked_weights_are_zero(sparse)


def test_a_longer_run_with_ramps_under_adamw(tmp_path: Path) -> None:
    config = GaPConfig(sparsity=0.9, num_partitions=2, num_rounds=2, sparse_compute=True)
    changes = {"max_steps": 80, "optim": "adamw_torch_fused", "learning_rate": 1e-3, "logging_steps": 20}
    sparse, dense = (run(tmp_path, config.replace(sparse_compute=on), **changes) for on in (True, False))

    def losses(trainer: GaPTrainer) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    # Adam divides by what it has seen of a gradient, so that rounding grows; the two runs learn the same.
    assert losses(sparse) == pytest.approx(losses(dense), rel=0.02)
    assert losses(sparse)[-1] < losses(sparse)[0]
    assert_masked_weights_are_zero(sparse)


def test_growth_by_gradient_sees_it_whole(tmp_path: Path, calls: dict[str, int]) -> None:
    sparse = run(tmp_path, RIGL)
    assert calls["weight_gradient"] > 0
    assert_agree(sparse, run(tmp_path, RIGL.replace(sparse_compute=False)))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_gradient_checkpointing(tmp_path: Path, calls: dict[str, int]) -> None:
    sparse = run(tmp_path, SPARSE, gradient_checkpointing=True)
    assert calls["output"] > calls["input_gradient"] > 0
    assert_agree(sparse, run(tmp_path, CONFIG, gradient_checkpointing=True))


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 6, "optim": "adamw_torch_fused", "learning_rate": 5e-3}
    whole = run(tmp_path, SPARSE, **changes)
    assert whole.gap is not None
    for step in (6, 12):
        again = gap_trainer(
            tmp_path, config=SPARSE, model=causal_lm(n_embd=32), **{"max_steps": 24, "max_grad_norm": 0.0, **changes}
        )
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.gap is not None and again.gap.masks.digest() == whole.gap.masks.digest()
        assert same_tensors(dict(again.model.state_dict()), dict(whole.model.state_dict()))  # type: ignore[union-attr]


class Swaps(GaPTrainer):
    """Evaluates other weights, which it puts in and out as averages of weights are: by ways that torch does not count."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        weights: Any = self.model.parameters()  # type: ignore[union-attr]
        before = [(weight, weight.detach().clone()) for weight in weights]
        for weight, _ in before:
            weight.data.mul_(3)
        found = super().evaluate(*args, **kwargs)
        for weight, old in before:
            weight.data.copy_(old)
        return found


def test_weights_that_are_swapped_for_an_evaluation(tmp_path: Path) -> None:
    losses = []
    weights = []
    for config in (SPARSE, SPARSE.replace(sparse_compute=False)):
        plain = gap_trainer(
            tmp_path,
            config=config,
            model=causal_lm(n_embd=32),
            eval_dataset=Tokens(8),
            max_steps=24,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            eval_strategy="steps",
            eval_steps=5,
        )
        trainer = Swaps(plain.model, plain.args, train_dataset=Tokens(), eval_dataset=Tokens(8), gap_config=config)
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
        weights.append(dict(trainer.model.state_dict()))  # type: ignore[union-attr]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-5)


def test_a_run_that_fails_leaves_ordinary_layers(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyError("on purpose")

    trainer = gap_trainer(tmp_path, config=SPARSE, callbacks=[Fail()])
    with pytest.raises(KeyError, match="on purpose"):
        trainer.train()
    assert not any("Sparse" in type(module).__name__ for module in trainer.model.modules())  # type: ignore[union-attr]


def test_without_a_compiler_it_is_dense_training_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_state", {"warned": False, "broken": False, "forked": False})
    monkeypatch.setattr(compiled, "_llvm", lambda: compiled._warn("llvmlite cannot be used (on purpose)"))
    with caplog.at_level(logging.WARNING):
        sparse = run(tmp_path, SPARSE)
        run(tmp_path, SPARSE)
    assert sum("llvmlite cannot be used" in record.message for record in caplog.records) == 1
    dense = run(tmp_path, CONFIG)
    assert same_tensors(dict(sparse.model.state_dict()), dict(dense.model.state_dict()))  # type: ignore[union-attr]


def test_what_is_refused(tmp_path: Path) -> None:
    for key in ("bf16", "torch_compile"):
        with pytest.raises(GaPError, match=rf"gap\.sparse_compute: .* found training\.{key}: true"):
            gap_trainer(tmp_path / key, config=SPARSE, **{key: True})
        assert not (tmp_path / key).exists()
    with pytest.raises(GaPError, match=r"gap\.sparse_compute: cannot go with workers: sequential"):
        GaPConfig(sparsity=0.9, method="parallel", workers="sequential", sparse_compute=True)
    with pytest.raises(GaPError, match=r"gap\.sparse_compute: found 'yes', expected true or false"):
        GaPConfig.from_dict({"sparsity": 0.9, "sparse_compute": "yes"})
