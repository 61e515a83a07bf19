"""Masks of every pattern against the plain reference: exact counts, ties by lowest index, little memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory import PeakMemory
from torch import Tensor

from gap_hf import largest, patterns
from gap_hf.errors import GaPError
from gap_hf.pattern_names import Pattern, parse_pattern
from gap_hf.patterns import (
    check_fits,
    erk_counts,
    magnitude_mask,
    matrix_shape,
    num_kept,
    num_units,
    pooled_masks,
    random_mask,
)

UNSTRUCTURED = Pattern("unstructured")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["out_in", "in_out", "conv", "expert_out_in", "expert_in_out"]
# Few different magnitudes make many ties; the others are where a bit trick could go wrong.
VALUES = {
    "ties": [-2.0, -1.0, 0.0, 1.0, 2.0],
    "zeros": [0.0, -0.0, 1.0],
    "infinite": [float("inf"), -float("inf"), 1.0, -3.0, 0.0],
    "tiny": [6e-8, -6e-8, 1.2e-7, 0.0, 6.1e-5],
    "near": [1.0, 1.0078125, -1.0078125, 1.015625, -1.0],
    "mixed": [0.001, -0.5, 0.75, 3.0, -128.0, 1e-4, 7.0],
}
values_of = st.sampled_from(sorted(VALUES))
chunks = st.sampled_from([1, 3, 16, 1 << 22])


@contextlib.contextmanager
def chunk_size(size: int) -> Iterator[None]:
    """Small chunks, so that small tensors cross their borders."""
    before = patterns.CHUNK
    patterns.CHUNK = largest.CHUNK = size
    try:
        yield
    finally:
        patterns.CHUNK = largest.CHUNK = before


def draw_tensor(shape: tuple[int, ...], kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.tensor(VALUES[kind], dtype=torch.float64)
    places = torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))
    return values[places].to(dtype)


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def shape_of(layout: str, outputs: int, inputs: int) -> tuple[int, ...]:
    return {
        "out_in": (outputs, inputs),
        "in_out": (inputs, outputs),
        "conv": (outputs, inputs, 2, 3),
        "expert_out_in": (3, outputs, inputs),
        "expert_in_out": (3, inputs, outputs),
    }[layout]


# --- counts ----------------------------------------------------------------------------------------------------------


@given(st.fractions(0, 1, max_denominator=100), st.integers(0, 60))
def test_num_kept_is_the_nearest_count(sparsity: Fraction, units: int) -> None:
    assert num_kept(sparsity, units) == reference.exact_keep(sparsity, units)


def test_num_kept_takes_decimals_as_written() -> None:
    # In binary 1 - 0.9 is a little under a tenth and 5 * (1 - 0.9) would round to 0.
    assert num_kept(0.9, 5) == 1
    assert num_kept(Fraction(9, 10), 5) == 1
    assert num_kept(0.3, 5) == 4
    assert num_kept(0.9, 10**9 + 5) == 10**8 + 1
    assert num_kept(0.0, 7) == 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(layout: str) -> None:
    shape = shape_of(layout, 8, 12)
    batch, outputs, inputs = matrix_shape(shape, layout)
    assert (outputs, inputs) == (8, 12)
    assert batch * 8 * 12 == torch.empty(shape).numel()
    assert num_units(shape, UNSTRUCTURED) == batch * 96
    assert num_units(shape, parse_pattern("block:4x3")) == batch * 8


# --- unstructured ----------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 300),
    kind=values_of,
    dtype=st.sampled_from(DTYPES),
    chunk=chunks,
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_unstructured(size: int, kind: str, dtype: torch.dtype, chunk: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, size))
    weight = draw_tensor((size,), kind, seed, dtype).reshape(-1, 1)
    with chunk_size(max(chunk, size // 20)):
        mask = magnitude_mask(weight, UNSTRUCTURED, keep)
    assert mask.dtype == torch.uint8
    assert mask.shape == weight.shape
    assert int(mask.sum()) == keep
    assert mask.flatten().tolist() == reference.largest_mask(as_numpy(weight).flatten().tolist(), keep).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [0, 1, 250, 4999, 5000])
def test_unstructured_on_random_weights(dtype: torch.dtype, keep: int) -> None:
    weight = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    with chunk_size(333):
        mask = magnitude_mask(weight, UNSTRUCTURED, keep)
    assert mask.flatten().tolist() == reference.largest_mask(as_numpy(weight).flatten().tolist(), keep).tolist()


def test_float64_is_not_compared_in_float32() -> None:
    weight = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 + 2e-12]], dtype=torch.float64)
    assert magnitude_mask(weight, UNSTRUCTURED, 1).tolist() == [[0, 0, 1]]


def test_all_equal_keeps_the_first() -> None:
    weight = torch.full((3, 4), -0.5)
    assert magnitude_mask(weight, UNSTRUCTURED, 5).flatten().tolist() == [1] * 5 + [0] * 7
    assert magnitude_mask(torch.zeros(3, 4), UNSTRUCTURED, 5).flatten().tolist() == [1] * 5 + [0] * 7


def test_the_weight_is_only_read_and_may_be_a_view() -> None:
    base = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = base.detach().clone()
    mask = magnitude_mask(base.t(), UNSTRUCTURED, 13)
    assert torch.equal(base.detach(), before)
    assert not mask.requires_grad
    assert mask.flatten().tolist() == reference.largest_mask(as_numpy(base.t()).flatten().tolist(), 13).tolist()


# --- pools -----------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    kind=values_of,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    chunk=chunks,
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_pools(
    sizes: list[int], kind: str, dtypes: list[torch.dtype], chunk: int, seed: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, sum(sizes)))
    weights = [draw_tensor((1, n), kind, seed + i, dtypes[i]) for i, n in enumerate(sizes)]
    with chunk_size(chunk):
        masks = pooled_masks(weights, UNSTRUCTURED, keep, ["out_in"] * len(sizes), [f"w{i}" for i in range(len(sizes))])
    assert sum(int(m.sum()) for m in masks) == keep
    expected = reference.pooled_masks([as_numpy(w) for w in weights], keep)
    for mask, want in zip(masks, expected, strict=True):
        assert mask.dtype == torch.uint8
        assert mask.tolist() == want.tolist()


def test_pooled_blocks() -> None:
    weights = [draw_tensor((4, 6), "ties", 0), draw_tensor((6, 8), "ties", 1)]
    masks = pooled_masks(weights, parse_pattern("block:2x1"), 15, ["out_in", "in_out"], ["a", "b"])
    scores = [
        np.abs(as_numpy(weights[0])).reshape(2, 2, 6).sum(1),
        np.abs(as_numpy(weights[1]).T).reshape(4, 2, 6).sum(1),
    ]
    expected = [np.repeat(m, 2, axis=0) for m in reference.pooled_masks(scores, 15)]
    assert masks[0].tolist() == expected[0].tolist()
    assert masks[1].t().tolist() == expected[1].tolist()


# --- structured ------------------------------------------------------------------------------------------------------


@given(
    layout=st.sampled_from(LAYOUTS),
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8)]),
    outputs=st.integers(1, 5),
    groups=st.integers(1, 4),
    kind=values_of,
    dtype=st.sampled_from(DTYPES),
    chunk=chunks,
    seed=st.integers(0, 999),
)
def test_n_of_m(
    layout: str,
    nm: tuple[int, int],
    outputs: int,
    groups: int,
    kind: str,
    dtype: torch.dtype,
    chunk: int,
    seed: int,
) -> None:
    n, m = nm
    shape = shape_of(layout, outputs, groups * m)
    weight = draw_tensor(shape, kind, seed, dtype)
    with chunk_size(chunk):
        mask = magnitude_mask(weight, parse_pattern(f"{n}:{m}"), 0, layout)
    assert mask.dtype == torch.uint8
    assert mask.is_contiguous()
    assert mask.tolist() == reference.n_of_m_mask(as_numpy(weight), n, m, layout).tolist()


@given(
    layout=st.sampled_from(LAYOUTS),
    block=st.sampled_from([(1, 1), (1, 4), (4, 1), (2, 3), (3, 2)]),
    kind=st.sampled_from(["ties", "zeros", "infinite"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_blocks(
    layout: str, block: tuple[int, int], kind: str, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    """Small whole numbers, so that sums are exact in every order of summation."""
    rows, cols = block
    pattern = Pattern("block", rows=rows, cols=cols)
    shape = shape_of(layout, rows * 2, cols * 3)
    weight = draw_tensor(shape, kind, seed, dtype)
    keep = data.draw(st.integers(0, num_units(shape, pattern)))
    with chunk_size(5):
        mask = magnitude_mask(weight, pattern, keep, layout)
    assert int(mask.sum()) == keep * rows * cols
    assert mask.is_contiguous()
    assert mask.tolist() == reference.block_mask(as_numpy(weight), rows, cols, keep, layout).tolist()


@pytest.fixture(scope="module")
def tiles() -> list[np.ndarray]:
    found = reference.all_transposable_tiles()
    assert len(found) == 90
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", sorted(VALUES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposable(layout: str, kind: str, dtype: torch.dtype, tiles: list[np.ndarray]) -> None:
    weight = draw_tensor(shape_of(layout, 8, 12), kind, 3, dtype)
    # A large number stands in for infinity, so that the tile that keeps more of them is the better one.
    magnitudes = np.minimum(np.abs(as_numpy(weight)), 1e300)
    with chunk_size(256):
        mask = magnitude_mask(weight, parse_pattern("transposable:2:4"), 0, layout)
    matrices = reference.as_matrices(mask.numpy(), layout)
    for matrix in matrices:
        blocks = matrix.reshape(2, 4, 3, 4)
        assert (blocks.sum(1) == 2).all()
        assert (blocks.sum(3) == 2).all()
    wanted = reference.transposable_mask(magnitudes, layout, tiles)
    if kind in ("ties", "zeros", "near"):  # sums are exact: the very same tile
        assert mask.tolist() == wanted.tolist()
    assert (magnitudes * mask.numpy()).sum() == pytest.approx((magnitudes * wanted).sum(), rel=1e-12)


def test_transposable_works_along_both_sides() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    pattern = parse_pattern("transposable:2:4")
    mask = magnitude_mask(weight, pattern, 0, "out_in")
    n_of_m = parse_pattern("2:4")
    assert torch.equal(magnitude_mask(mask.float(), n_of_m, 0, "out_in"), mask)
    assert torch.equal(magnitude_mask(mask.float(), n_of_m, 0, "in_out"), mask)


@pytest.mark.parametrize(
    ("pattern", "shape", "layout", "words"),
    [
        ("2:4", (8, 6), "out_in", ["'some.weight' has 6 inputs", "4 does not divide", "gap.exclude"]),
        ("2:4", (6, 8), "in_out", ["6 inputs"]),
        ("2:4", (8, 6, 3, 3), "conv", ["6 inputs"]),
        ("2:4", (2, 6, 8), "expert_in_out", ["6 inputs"]),
        ("block:4x1", (6, 8), "out_in", ["6 outputs", "4 does not divide"]),
        ("block:1x3", (6, 8), "out_in", ["8 inputs", "3 does not divide"]),
        ("transposable:2:4", (6, 8), "out_in", ["6 outputs"]),
        ("transposable:2:4", (8, 6), "out_in", ["6 inputs"]),
    ],
)
def test_patterns_that_do_not_divide_a_weight(
    pattern: str, shape: tuple[int, ...], layout: str, words: list[str]
) -> None:
    with pytest.raises(GaPError) as error:
        check_fits("some.weight", shape, layout, parse_pattern(pattern))
    assert str(error.value).startswith("gap.pattern: ")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "shape", "layout"),
    [
        ("unstructured", (5, 7), "out_in"),
        ("2:4", (5, 8), "out_in"),
        ("2:4", (8, 5), "in_out"),
        ("2:4", (3, 5, 8), "expert_out_in"),
        ("block:5x2", (5, 8), "out_in"),
        ("transposable:2:4", (4, 8, 3), "conv"),
    ],
)
def test_patterns_that_fit(pattern: str, shape: tuple[int, ...], layout: str) -> None:
    check_fits("some.weight", shape, layout, parse_pattern(pattern))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x2", "transposable:2:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_by_name(pattern: str, dtype: torch.dtype) -> None:
    weight = torch.ones(8, 8, dtype=dtype)
    weight[7, 3] = float("nan")
    with chunk_size(16), pytest.raises(GaPError, match=r"^layer\.7\.weight: holds NaN"):
        magnitude_mask(weight, parse_pattern(pattern), 5, name="layer.7.weight")
    with pytest.raises(GaPError, match=r"^b: holds NaN"):
        pooled_masks([torch.ones(2, 2), weight], UNSTRUCTURED, 3, ["out_in"] * 2, ["a", "b"])


# --- random ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["unstructured", "2:4", "block:4x2", "transposable:2:4"])
def test_random_masks(layout: str, name: str) -> None:
    pattern = parse_pattern(name)
    shape = shape_of(layout, 16, 24)
    keep = num_kept(Fraction(7, 10), num_units(shape, pattern))
    state = torch.get_rng_state()

    def draw(seed: int) -> Tensor:
        return random_mask(shape, pattern, keep, layout, torch.Generator().manual_seed(seed))

    mask = draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert mask.dtype == torch.uint8
    assert mask.shape == shape
    per_unit = pattern.rows * pattern.cols
    assert int(mask.sum()) == (mask.numel() // 2 if pattern.fixed_sparsity else keep * per_unit)
    assert torch.equal(draw(1), mask)
    assert not torch.equal(draw(2), mask)
    # The mask has the pattern's form exactly if pruning it by magnitude changes nothing.
    assert torch.equal(magnitude_mask(mask.float(), pattern, keep, layout), mask)


def test_random_masks_do_not_depend_on_the_global_generator() -> None:
    def draw() -> Tensor:
        return random_mask((10, 10), UNSTRUCTURED, 40, "out_in", torch.Generator().manual_seed(5))

    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)


def test_random_masks_reach_every_place_equally() -> None:
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(4, 5)
    for _ in range(1000):
        total += random_mask((4, 5), UNSTRUCTURED, 5, "out_in", generator)
    # 250 expected, standard deviation 13.7: five of them.
    assert (total - 250).abs().max() < 69


# --- ERK -------------------------------------------------------------------------------------------------------------

sides = st.sampled_from([(), (), (), (1, 1), (3,), (3, 3), (5, 3), (7, 7)])
shapes = st.tuples(sides, st.integers(1, 40), st.integers(1, 40))


@given(shapes=st.lists(shapes, min_size=1, max_size=8), sparsity=st.sampled_from(["0.1", "0.5", "0.8", "0.9", "0.99"]))
def test_erk(shapes: list[tuple[tuple[int, ...], int, int]], sparsity: str) -> None:
    target = Fraction(sparsity)
    units = [int(np.prod([*sides, o, i])) for sides, o, i in shapes]
    # Evci et al. 2020, section 3: 1 - (n_in + n_out + w + h) / (n_in * n_out * w * h) for convolutions.
    raw = [Fraction(sum([*sides, o, i]), n) for (sides, o, i), n in zip(shapes, units, strict=True)]
    counts = erk_counts(shapes, units, target)
    total = reference.exact_keep(target, sum(units))
    assert sum(counts) == total
    assert all(0 <= k <= n for k, n in zip(counts, units, strict=True))
    assert counts == reference.erk_counts(raw, units, total)


def test_erk_makes_larger_layers_sparser() -> None:
    counts = erk_counts([((), 64, 64), ((), 256, 256), ((), 4, 4)], [4096, 65536, 16], Fraction(9, 10))
    densities = [k / n for k, n in zip(counts, [4096, 65536, 16], strict=True)]
    assert densities[2] == 1.0
    assert densities[0] > densities[1]
    assert sum(counts) == 6965


# --- memory ----------------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_is_alive() -> None:
    given = torch.zeros(1000)
    with PeakMemory(given) as memory:
        given.add_(1)
        assert memory.peak == 0
        a = given + 1
        a.view(10, 100).mul_(2)
        assert memory.current == 4000
        b = a.to(torch.float64)
        assert memory.current == 12000
        del a
        assert memory.current == 8000
        del b
    assert (memory.current, memory.peak) == (0, 12000)


@pytest.mark.parametrize("name", ["unstructured", "2:4", "block:16x1", "block:1x4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_needs_less_than_two_tensors_more(name: str, dtype: torch.dtype) -> None:
    """With a chunk as small beside this tensor as the real one is beside a billion weights."""
    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0)).to(dtype)
    pattern = parse_pattern(name)
    keep = num_kept(0.9, num_units(weight.shape, pattern))
    with chunk_size(1 << 14), PeakMemory(weight) as memory:
        magnitude_mask(weight, pattern, keep)
    assert memory.peak < 2 * weight.nbytes


def test_pruning_a_large_tensor_with_the_real_chunk() -> None:
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    with PeakMemory(weight) as memory:
        mask = magnitude_mask(weight, UNSTRUCTURED, num_kept(0.9, weight.numel()))
    assert int(mask.sum()) == num_kept(0.9, weight.numel())
    assert memory.peak < 2 * weight.nbytes


# --- GPU -------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["unstructured", "2:4", "block:4x4", "transposable:2:4"])
def test_masks_are_the_same_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    pattern = parse_pattern(name)
    # Whole numbers: block sums are exact in any order of summation.
    whole = draw_tensor((512, 512), "ties", 0, dtype)
    keep = num_kept(0.8, num_units(whole.shape, pattern))
    weights = [whole]
    if pattern.kind != "block":
        weights.append(torch.randn(512, 512, generator=torch.Generator().manual_seed(1)).to(dtype))
    for weight in weights:
        mask = magnitude_mask(weight.cuda(), pattern, keep)
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), magnitude_mask(weight, pattern, keep))


@pytest.mark.gpu
@needs_gpu
def test_gpu_pruning_needs_less_than_two_tensors_more() -> None:
    weight = torch.randn(1 << 14, 1 << 14, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    magnitude_mask(weight, UNSTRUCTURED, weight.numel() // 10)
    assert torch.cuda.max_memory_allocated() - before < 2 * weight.nbytes
