"""Masks by name, and their bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gap_hf.errors import GaPError
from gap_hf.masks import Masks, pack_bits, unpack_bits

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def random_bits(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(2, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def two_params() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(3, 5, generator=generator)) for name in ("a", "b")}


# --- bits ------------------------------------------------------------------------------------------------------------


@given(shape=shapes, seed=st.integers(0, 99))
def test_bits_round_trip(shape: tuple[int, ...], seed: int) -> None:
    mask = random_bits(shape, seed)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (math.ceil(mask.numel() / 8),)
    again = unpack_bits(bits, shape, "w")
    assert again.dtype == torch.uint8
    assert torch.equal(again, mask)


def test_bit_order_is_lowest_first_and_row_major() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.uint8)
    assert pack_bits(mask).tolist() == [1 + 32 + 64, 2]
    assert pack_bits(mask.t()).tolist() == pack_bits(mask.t().contiguous()).tolist()


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (torch.zeros(1, dtype=torch.uint8), ["w: its mask holds (1,)", "expected (2,)", "(2, 5)"]),
        (torch.zeros(3, dtype=torch.uint8), ["holds (3,)"]),
        (torch.zeros(2, dtype=torch.int8), ["torch.int8", "torch.uint8"]),
        (torch.zeros(2, 1, dtype=torch.uint8), ["holds (2, 1)"]),
        (torch.tensor([0, 4], dtype=torch.uint8), ["ones beyond its 10 weights"]),
    ],
)
def test_bits_that_do_not_fit(bits: Tensor, words: list[str]) -> None:
    with pytest.raises(GaPError) as error:
        unpack_bits(bits, (2, 5), "w")
    for word in words:
        assert word in str(error.value)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_set_gives_plus_zero_and_removes_nan() -> None:
    param = nn.Parameter(torch.tensor([[-1.0, float("nan"), float("-inf"), 2.0, -3.0]]))
    masks = Masks({"w": param})
    masks.set("w", torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.uint8))
    assert param.tolist() == [[0, 0, 0, 2, -3]]
    assert not torch.signbit(param[0, :3]).any()


def test_set_keeps_every_survivor_to_the_bit() -> None:
    params = two_params()
    before = params["a"].detach().clone()
    mask = random_bits((3, 5))
    Masks(params).set("a", mask)
    assert torch.equal(params["a"][mask == 1], before[mask == 1])
    assert not params["a"].detach()[mask == 0].any()


def test_growing_changes_no_value() -> None:
    params = two_params()
    masks = Masks(params)
    masks.set("a", random_bits((3, 5)))
    before = params["a"].detach().clone()
    masks.set("a", None)
    assert masks["a"] is None
    assert torch.equal(params["a"], before)


@pytest.mark.parametrize("mask", [torch.ones(5, 3, dtype=torch.uint8), torch.ones(3, 5), torch.ones(3, 5).bool()])
def test_set_wants_uint8_of_the_same_shape(mask: Tensor) -> None:
    with pytest.raises(AssertionError):
        Masks(two_params()).set("a", mask)


def test_applying_to_weights_and_gradients() -> None:
    params = two_params()
    masks = Masks(params)
    mask = random_bits((3, 5))
    masks.set("a", mask)
    for param in params.values():
        param.grad = torch.ones_like(param)
        with torch.no_grad():
            param.add_(1)
    dense = params["b"].detach().clone()
    masks.apply_to_gradients()
    masks.apply_to_weights()
    gradients = [param.grad.tolist() for param in params.values() if param.grad is not None]
    assert gradients == [mask.tolist(), torch.ones(3, 5).tolist()]
    assert torch.equal(params["a"].detach() == 0, mask == 0)
    assert torch.equal(params["b"], dense)


def test_masks_follow_a_model_that_is_moved() -> None:
    layer = nn.Linear(4, 3)
    masks = Masks({"w": layer.weight})
    masks.set("w", random_bits((3, 4)))
    masks.params["w"] = nn.Parameter(layer.weight.to("meta"))  # .cuda() keeps the parameter
    assert [mask.device.type for _, mask in masks.sparse_params()] == ["meta"]
    assert masks["w"].device.type == "meta"  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_masks_follow_a_model_to_a_gpu() -> None:
    layer = nn.Linear(4, 3)
    masks = Masks({"w": layer.weight})
    mask = random_bits((3, 4))
    masks.set("w", mask)
    for place in ("cuda", "cpu"):
        masks.apply_to_weights()
        layer.to(place)
        layer.weight.data.fill_(1)
        masks.apply_to_weights()
        assert torch.equal(layer.weight.detach().cpu(), mask.float())


def test_a_parameter_without_a_gradient_is_left_out() -> None:
    params = two_params()
    masks = Masks(params)
    masks.set("a", random_bits((3, 5)))
    masks.apply_to_gradients()
    assert params["a"].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(3, 5, dtype=dtype))
    masks = Masks({"w": param})
    mask = random_bits((3, 5))
    masks.set("w", mask)
    param.grad = torch.ones_like(param)
    masks.apply_to_gradients()
    masks.apply_to_weights()
    assert param.dtype == param.grad.dtype == dtype
    assert param.tolist() == param.grad.tolist() == mask.tolist()


def test_counts() -> None:
    params = two_params()
    masks = Masks(params)
    assert (masks.live("a"), masks.sparsity()) == (15, 0.0)
    mask = torch.zeros(3, 5, dtype=torch.uint8)
    mask[0, :4] = 1
    masks.set("a", mask)
    assert masks.live("a") == 4
    assert masks.sparsity(["a"]) == pytest.approx(11 / 15)
    assert masks.sparsity() == pytest.approx(11 / 30)
    assert list(masks) == ["a", "b"]
    assert [(p is params["a"], torch.equal(m, mask)) for p, m in masks.sparse_params()] == [(True, True)]


def test_counts_of_more_live_weights_than_uint8_holds() -> None:
    masks = Masks({"w": nn.Parameter(torch.ones(100, 100))})
    masks.set("w", torch.ones(100, 100, dtype=torch.uint8))
    assert masks.live("w") == 10_000


def test_digest_changes_with_a_bit_a_name_and_a_shape() -> None:
    def digest(name: str, mask: Tensor | None, shape: tuple[int, ...] = (3, 5)) -> str:
        masks = Masks({name: nn.Parameter(torch.ones(shape)), "other": nn.Parameter(torch.ones(2, 2))})
        masks.set(name, mask)
        return masks.digest()

    mask = random_bits((3, 5))
    flipped = mask.clone()
    flipped[2, 4] ^= 1
    seen = [
        digest("w", mask),
        digest("w", flipped),
        digest("v", mask),
        digest("w", mask.view(5, 3), (5, 3)),
        digest("w", None),
        digest("w", torch.ones_like(mask)),
    ]
    assert len(set(seen)) == len(seen)
    assert digest("w", mask.clone()) == seen[0]


def test_digest_does_not_depend_on_the_order_of_names() -> None:
    params = two_params()
    one, other = Masks(params), Masks(dict(reversed(params.items())))
    for masks in (one, other):
        masks.set("a", random_bits((3, 5), 1))
        masks.set("b", random_bits((3, 5), 2))
    assert one.digest() == other.digest()
