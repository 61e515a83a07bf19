"""The packed form of a tensor: bit for bit back again, as small as it says, and nothing believed that cannot be."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_hf.folders import _pack
from gap_hf.packed import layout
from gap_hf.packed.layout import PackedError, dense_mask, pack, parse_mask, unpack
from gap_hf.pattern_names import Pattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


def sparse(
    shape: tuple[int, ...], density: float, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(shape, generator=generator) < density).to(torch.uint8)
    weight = torch.randn(shape, generator=generator).masked_fill(mask == 0, 0).to(dtype)
    return weight, mask


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coding", layout.CODINGS)
def test_a_packed_tensor_comes_back_to_the_bit(dtype: torch.dtype, coding: str) -> None:
    weight, mask = sparse((24, 40), 0.1, dtype)
    values, blob = pack(weight, mask, coding=coding)
    assert values.shape == (int(mask.sum()),) and values.dtype == dtype
    assert same_bits(unpack(values, blob), weight)
    assert np.array_equal(dense_mask(blob.numpy()), mask.numpy().astype(bool))


def test_a_live_zero_and_a_live_negative_zero_are_kept() -> None:
    weight = torch.tensor([[0.0, -0.0, 3.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0]], dtype=torch.uint8)
    values, blob = pack(weight, mask)
    assert values.numel() == 3
    assert same_bits(unpack(values, blob), weight)
    assert dense_mask(blob.numpy()).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_negative_zero_is_a_zero(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-0.0, -0.0, 3.0, 0.0]], dtype=dtype)
    before = weight.clone()
    back = unpack(*pack(weight, torch.tensor([[1, 0, 1, 0]])))
    assert same_bits(back, torch.tensor([[-0.0, 0.0, 3.0, 0.0]], dtype=dtype)) and same_bits(weight, before)
    with pytest.raises(PackedError, match="a masked weight is not 0"):
        pack(-torch.full((1, 4), 1e-30, dtype=dtype), torch.zeros(1, 4))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    density=st.sampled_from([0.0, 0.003, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
    coding=st.sampled_from([None, *layout.CODINGS]),
)
def test_any_shape_and_density(shape: list[int], density: float, seed: int, coding: str | None) -> None:
    weight, mask = sparse(tuple(shape), density, torch.float32, seed)
    assert same_bits(unpack(*pack(weight, mask, coding=coding)), weight)


def test_long_gaps_and_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_CHUNK", 16)
    mask = torch.zeros(4000, dtype=torch.uint8)
    mask[[0, 1, 255, 256, 511, 767, 1022, 3999]] = 1
    weight = torch.arange(1.0, 4001.0) * mask
    for coding in layout.CODINGS:
        assert same_bits(unpack(*pack(weight, mask, coding=coding)), weight)


@pytest.mark.parametrize(("shape", "block"), [((64, 20), (16, 1)), ((20, 64), (1, 16)), ((3, 32, 8), (1, 16, 2))])
def test_blocks_are_a_bit_each(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    grid, _ = sparse(tuple(n // b for n, b in zip(shape, block, strict=True)), 0.3, torch.float32)
    mask = (grid != 0).to(torch.uint8)
    for axis, size in enumerate(block):
        mask = mask.repeat_interleave(size, dim=axis)
    weight = torch.randn(shape) * mask
    weight.masked_fill_(mask == 0, 0)
    values, blob = pack(weight, mask, block=block, coding="raw")
    assert blob.numel() == 16 + 12 * len(shape) + (grid.numel() + 7) // 8
    assert same_bits(unpack(values, blob), weight)


def test_sizes_are_near_the_entropy_of_the_mask() -> None:
    """Bytes as a share of dense: at 90 % the limit is .1147 (fp32) and .1293 (bf16), at 80 % .2226."""
    for density, dtype, most in (
        (0.1, torch.float32, 0.120),
        (0.1, torch.bfloat16, 0.135),
        (0.2, torch.float32, 0.228),
    ):
        weight, mask = sparse((1024, 1024), density, dtype)
        values, blob = pack(weight, mask)
        share = (values.numel() * values.element_size() + blob.numel()) / (weight.numel() * weight.element_size())
        assert share <= most, (density, dtype, share)


@pytest.mark.parametrize(("density", "coding"), [(0.5, "raw"), (0.1, "deflate"), (0.01, "gaps")])
def test_the_smallest_coding_is_chosen(density: float, coding: str) -> None:
    weight, mask = sparse((512, 512), density, torch.float32)
    assert parse_mask(pack(weight, mask)[1].numpy()).coding in {layout.CODINGS[coding], layout.GAPS}
    sizes = {name: pack(weight, mask, coding=name)[1].numel() for name in layout.CODINGS}
    assert pack(weight, mask)[1].numel() == min(sizes.values())
    assert sizes[coding] <= 1.02 * min(sizes.values())


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_a_coding_that_is_not_the_smallest_can_be_read(density: float) -> None:
    weight, mask = sparse((300, 300), density, torch.float32)
    for coding in layout.CODINGS:
        assert same_bits(unpack(*pack(weight, mask, coding=coding)), weight)


def test_what_is_no_masked_weight_is_refused() -> None:
    weight, mask = torch.ones(2, 4), torch.zeros(2, 4)
    with pytest.raises(PackedError, match="a masked weight is not 0"):
        pack(weight, mask)
    with pytest.raises(PackedError, match="does not consist of blocks"):
        pack(torch.zeros(2, 4), torch.eye(2, 4), block=(2, 1))
    with pytest.raises(PackedError, match="do not divide"):
        pack(torch.zeros(2, 4), mask, block=(1, 3))
    with pytest.raises(PackedError, match="the mask has shape"):
        pack(torch.zeros(2, 4), torch.zeros(4, 2))


def head(**changes: int) -> bytes:
    fields = {
        "version": 1,
        "coding": 0,
        "values": 0,
        "ndim": 2,
        "count": 4,
        "rows": 8,
        "cols": 8,
        "r": 1,
        "c": 1,
    } | changes
    return struct.pack("<4sBBBBQQQII", b"GAPM", *fields.values())


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"GAPM",
        b"XXXX" + head()[4:] + bytes(8),
        head(version=2) + bytes(8),
        head(coding=3) + bytes(8),
        head(values=1) + bytes(8),
        head(ndim=0) + bytes(8),
        head(ndim=200) + bytes(8),
        head(rows=0) + bytes(8),
        head(rows=2**63, cols=2**63) + bytes(8),
        head(count=65) + bytes(8),
        head(r=3) + bytes(8),
        head(r=0) + bytes(8),
        head(r=2, count=3) + bytes(4),
        head() + bytes(7),
        head() + bytes(9),
        head() + bytes(8),  # four live weights promised, none there
        head(coding=1, rows=2**20, cols=2**20) + bytes(8),
        head(coding=2, rows=2**20, cols=2**20) + bytes(8),
        head(coding=1) + b"\xff" * 8,
        head(coding=1),
        # All of it one dead block, which would be 64 GiB of mask.
        head(rows=2**18, cols=2**18, r=2**18, c=2**18, count=0) + bytes(1),
        head(coding=2, rows=2**18, cols=2**18, r=2**9, c=2**9, count=0) + bytes(900),
    ],
)
def test_a_lie_is_refused_in_one_sentence_before_it_costs_memory(blob: bytes) -> None:
    with pytest.raises(PackedError, match=r"^the mask [^\n]+$"):
        dense_mask(np.frombuffer(blob, np.uint8))


@pytest.mark.parametrize("coding", layout.CODINGS)
def test_a_thousand_mutations_are_refused_or_harmless(coding: str) -> None:
    """Flipped, cut, lengthened and overwritten masks: an error of ours, or a mask of the same count that is one."""
    weight, mask = sparse((32, 48), 0.1, torch.float32)
    values, blob = pack(weight, mask, coding=coding)
    rng = np.random.default_rng(7)
    honest = blob.numpy()
    refused = 0
    for _ in range(1000):
        mutated = honest.copy()
        where = rng.integers(mutated.size)
        kind = rng.integers(4)
        if kind == 0:
            mutated[where] ^= 1 << rng.integers(8)
        elif kind == 1:
            mutated = mutated[:where]
        elif kind == 2:
            mutated = np.concatenate([mutated, rng.integers(0, 256, 1 + where, dtype=np.uint8)])
        else:
            mutated[where : where + 8] = 255
        try:
            out = unpack(values, torch.from_numpy(mutated))
        except PackedError:
            refused += 1
        else:
            assert out.numel() == weight.numel()
    assert refused > 800


@pytest.mark.parametrize("block", [(64, 64), (16, 1)])
def test_blocks_that_say_too_little_are_written_as_single_weights(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int]
) -> None:
    monkeypatch.setattr(layout, "_FREE_NUMEL", 2**10)
    weight = torch.zeros(1024, 1024)
    with pytest.raises(
        PackedError, match=r"the mask is of 1048576 weights, expected at most \d+ for \d+ bytes and 0 live"
    ):
        pack(weight, weight, block=block)
    values, blob = _pack(weight, weight, Pattern("block", rows=block[0], cols=block[1]))
    assert parse_mask(blob.numpy()).block == (1, 1)
    assert same_bits(unpack(values, blob), weight)


def test_values_of_another_mask_are_refused() -> None:
    weight, mask = sparse((8, 8), 0.5, torch.float32)
    values, blob = pack(weight, mask)
    for wrong in (values[:-1], values.view(1, -1), torch.cat([values, values])):
        with pytest.raises(PackedError, match="there are"):
            unpack(wrong, blob)
    with pytest.raises(PackedError, match="there are 7 values"):
        dense_mask(blob.numpy(), 7)
