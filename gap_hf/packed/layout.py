"""The packed form of one tensor: its live values, and beside them a mask of bits. docs/format.md is the specification.

Everything here reads what a stranger wrote: sizes are checked against each other before memory is taken by them.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GAPM"
VERSION = 1
RAW, DEFLATED, GAPS = 0, 1, 2
CODINGS = {"raw": RAW, "deflate": DEFLATED, "gaps": GAPS}
_FIXED = struct.Struct("<4sBBBBQ")
_MAX_DIMS, _MAX_NUMEL = 8, 2**48
# Deflate never makes more than this many bytes of one, so a shorter payload cannot hold what its header promises.
_MAX_RATIO = 1032
# Weights for each byte of the mask and each live weight, above those that a tensor may have for nothing. Whole blocks could say
# of any number that it is dead; single weights need a byte for 8 · 255 at least, as Huffman codes have a bit each.
_MAX_WEIGHTS, _FREE_NUMEL = 2048, 2**24
_CHUNK = 1 << 15  # bytes of bits that are looked through at a time: unpacked they fit a cache
_SKIP = 255  # in gaps: this many dead blocks, and no live one after them


class PackedError(ValueError):
    """A packed tensor that is not what it says; the message is one sentence."""


@dataclass(frozen=True)
class MaskHeader:
    """What the head of a mask says.

    Attributes:
        shape: Of the dense tensor.
        block: Weights that live or die as one, as sizes per axis; all ones if each is on its own.
        count: Live weights.
        coding: How the bits are written: `RAW`, `DEFLATED` or `GAPS`.
        start: Where they begin, in bytes.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    count: int
    coding: int
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def block_size(self) -> int:
        return math.prod(self.block)

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks per axis."""
        return tuple(n // b for n, b in zip(self.shape, self.block, strict=True))

    @property
    def num_blocks(self) -> int:
        return math.prod(self.grid)


def parse_mask(blob: np.ndarray) -> MaskHeader:
    """Read and check the head of a mask; nothing of the tensor's size is allocated.

    Args:
        blob: The mask as stored, 1-D uint8.

    Raises:
        PackedError: if anything in it is impossible.
    """
    if blob.dtype != np.uint8 or blob.ndim != 1:
        raise PackedError(f"the mask has dtype {blob.dtype} and {blob.ndim} dimensions, expected uint8 and 1")
    if blob.size < _FIXED.size:
        raise PackedError(f"the mask has {blob.size} bytes, expected at least {_FIXED.size}")
    magic, version, coding, values, ndim, count = _FIXED.unpack(blob[: _FIXED.size].tobytes())
    if magic != MAGIC:
        raise PackedError(f"the mask begins with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise PackedError(f"the mask has version {version}, expected {VERSION}, which this reader knows")
    if coding not in CODINGS.values() or values != 0:
        raise PackedError(
            f"the mask has coding {coding} and values {values}, expected {sorted(CODINGS.values())} and 0"
        )
    if not 1 <= ndim <= _MAX_DIMS:
        raise PackedError(f"the mask has {ndim} dimensions, expected 1 to {_MAX_DIMS}")
    start = _FIXED.size + 12 * ndim
    if blob.size < start:
        raise PackedError(f"the mask has {blob.size} bytes, expected at least {start} for {ndim} dimensions")
    numbers = struct.unpack(f"<{ndim}Q{ndim}I", blob[_FIXED.size : start].tobytes())
    header = MaskHeader(numbers[:ndim], numbers[ndim:], count, coding, start)
    _check_sizes(header, blob.size - start)
    return header


def _check_sizes(header: MaskHeader, payload: int) -> None:
    for size, block in zip(header.shape, header.block, strict=True):
        if size < 1 or block < 1 or size % block:
            raise PackedError(
                f"the mask has blocks of {header.block} in a shape of {header.shape}, which do not divide it"
            )
    if header.numel > _MAX_NUMEL:
        raise PackedError(f"the mask is of {header.numel} weights, expected at most {_MAX_NUMEL}")
    if header.count > header.numel or header.count % header.block_size:
        raise PackedError(
            f"the mask counts {header.count} live weights of {header.numel} in blocks of {header.block_size}"
        )
    size = header.start + payload
    limit = _FREE_NUMEL + _MAX_WEIGHTS * (size + header.count)
    if header.numel > limit:
        raise PackedError(
            f"the mask is of {header.numel} weights, expected at most {limit} for {size} bytes and {header.count} live weights"
        )
    num_bytes = (header.num_blocks + 7) // 8
    if header.coding == RAW and payload != num_bytes:
        raise PackedError(f"the mask has {payload} bytes of bits, expected {num_bytes}")
    # In gaps a byte stands for 255 blocks at most, in bits for 8.
    reach = 8 * _MAX_RATIO if header.coding == DEFLATED else _SKIP * _MAX_RATIO
    most = header.num_blocks + 64  # a writer that takes the smallest coding stays far below
    if header.coding != RAW and not 0 < payload <= most:
        raise PackedError(f"the mask has {payload} bytes of coded bits, expected 1 to {most}")
    if header.coding != RAW and payload * reach < header.num_blocks:
        raise PackedError(
            f"the mask has {payload} bytes of coded bits, which cannot tell of {header.num_blocks} blocks"
        )


def live_blocks(blob: np.ndarray, header: MaskHeader) -> np.ndarray:
    """Places of the live blocks in the grid, ascending, 1-D int64; their number is checked before it is returned.

    Raises:
        PackedError: if the bits are damaged, or not as many as the header says.
    """
    return np.concatenate([places for places, _ in _live_parts(blob, header)])


def _live_parts(blob: np.ndarray, header: MaskHeader) -> Iterator[tuple[np.ndarray, slice]]:
    """`live_blocks` part by part, so that what is done with a part finds it in a cache, and where among all each part lies.

    Sizes are checked at once, the number of live blocks with the last part.
    """
    places_of = _places_of_gaps if header.coding == GAPS else _places_of_bits
    expected = header.count // header.block_size
    return _counted(places_of(blob[header.start :], header, expected), expected)


def _counted(parts: Iterable[np.ndarray], expected: int) -> Iterator[tuple[np.ndarray, slice]]:
    found = 0
    for places in parts:
        start, found = found, found + places.size
        if found > expected:
            break
        yield places, slice(start, found)
    if found != expected:
        raise PackedError(f"the mask has {'more' if found > expected else found} live blocks, expected {expected}")


def _places_of_bits(payload: np.ndarray, header: MaskHeader, expected: int) -> Iterable[np.ndarray]:
    num_bytes = (header.num_blocks + 7) // 8
    bits = payload if header.coding == RAW else _inflate(payload, num_bytes)
    if bits.size != num_bytes:
        raise PackedError(f"the mask has {bits.size} bytes of bits, expected {num_bytes}")
    if header.num_blocks % 8 and bits[-1] >> header.num_blocks % 8:
        raise PackedError(f"the mask has a bit beyond its {header.num_blocks} blocks")
    return (
        np.flatnonzero(np.unpackbits(bits[i : i + _CHUNK], bitorder="little").view(bool)) + 8 * i
        for i in range(0, num_bytes, _CHUNK)
    )


def _places_of_gaps(payload: np.ndarray, header: MaskHeader, expected: int) -> Iterable[np.ndarray]:
    # The end counts as one more live block, so that the gaps have to add up to the whole grid.
    gaps = _inflate(payload, expected + 1 + header.num_blocks // _SKIP)
    marks = gaps != _SKIP
    places = np.cumsum(gaps + marks, dtype=np.int64)  # 254 + 1 and 255 + 0: both are bytes still
    places -= 1
    if not gaps.size or not marks[-1] or places[-1] != header.num_blocks:
        raise PackedError(f"the mask's gaps do not add up to its {header.num_blocks} blocks")
    return [places[:-1] if marks.all() else places[marks][:-1]]


def _inflate(payload: np.ndarray, most: int) -> np.ndarray:
    """At most `most` bytes; zlib takes memory as it makes them, so a lie costs no more than its own bytes."""
    stream = zlib.decompressobj(-15)
    try:
        out = stream.decompress(payload.tobytes(), most + 1)
    except zlib.error as error:
        raise PackedError(f"the mask cannot be inflated ({error})") from None
    if len(out) > most or not stream.eof or stream.unused_data:
        raise PackedError(f"the mask inflates to other than the {most} bytes at most that it should hold")
    return np.frombuffer(out, np.uint8)


def dense_mask(blob: np.ndarray, num_values: int | None = None) -> np.ndarray:
    """The whole mask, bool, of the dense tensor's shape; True is live.

    Args:
        num_values: How many lie beside it, if that is not checked elsewhere: memory is taken by the number of live weights.

    Raises:
        PackedError: as `parse_mask` and `live_blocks`, or if there are other than as many values as live weights.
    """
    header = parse_mask(blob)
    if num_values not in (None, header.count):
        raise PackedError(f"there are {num_values} values, expected {header.count}")
    places = live_blocks(blob, header)
    grid = np.zeros(header.num_blocks, bool)
    grid[places] = True
    return _expand(grid, header)


def _expand(grid: np.ndarray, header: MaskHeader) -> np.ndarray:
    mask = grid.reshape(header.grid)
    for axis, size in enumerate(header.block):
        if size > 1:
            mask = np.repeat(mask, size, axis=axis)
    return mask


def pack(
    weight: Tensor, mask: Tensor, *, block: Sequence[int] | None = None, coding: str | None = None
) -> tuple[Tensor, Tensor]:
    """Pack one tensor; `unpack` gives it back bit for bit, and +0 for every masked weight.

    Args:
        weight: Dense, any dtype.
        mask: Of its shape; not 0 is live.
        block: Sizes per axis of the blocks that live or die as one; each weight on its own if None.
        coding: One of `CODINGS`; the smallest if None.

    Returns:
        The live values, 1-D in row-major order, and the mask, 1-D uint8.

    Raises:
        PackedError: if a masked weight is not 0, or the mask is not made of such blocks, or of so few that no reader takes it.
    """
    import torch  # here and below: those that only read masks do not wait for it

    if tuple(mask.shape) != tuple(weight.shape) or not weight.numel():
        raise PackedError(f"the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    live = (mask.detach().cpu() != 0).numpy()
    masked = weight.detach().cpu()[torch.from_numpy(~live)].view(torch.uint8).reshape(-1, weight.element_size()).numpy()
    if weight.is_floating_point() and weight.element_size() > 1:
        masked[:, -1] &= 0x7F  # the sign: a product with a mask makes -0 of what was negative
    if masked.any():
        raise PackedError("a masked weight is not 0")
    shape = tuple(weight.shape)
    header = MaskHeader(shape, tuple(block or [1] * len(shape)), int(live.sum()), RAW, 0)
    _check_blocks(header)
    grid = live[tuple(slice(None, None, b) for b in header.block)].reshape(-1)
    if not np.array_equal(_expand(grid, header), live):
        raise PackedError(f"the mask does not consist of blocks of {header.block}")
    payloads = _payloads(grid) if coding is None else {CODINGS[coding]: _payloads(grid)[CODINGS[coding]]}
    chosen = min(payloads, key=lambda name: (len(payloads[name]), name))
    head = _FIXED.pack(MAGIC, VERSION, chosen, 0, len(shape), header.count)
    head += struct.pack(f"<{len(shape)}Q{len(shape)}I", *shape, *header.block)
    _check_sizes(replace(header, coding=chosen, start=len(head)), len(payloads[chosen]))
    blob = torch.frombuffer(bytearray(head + payloads[chosen]), dtype=torch.uint8)
    return weight.detach().cpu()[torch.from_numpy(live)], blob


def _check_blocks(header: MaskHeader) -> None:
    if len(header.block) != len(header.shape) or any(
        b < 1 or n % b for n, b in zip(header.shape, header.block, strict=False)
    ):
        raise PackedError(f"blocks of {header.block} do not divide a shape of {header.shape}")


def _payloads(grid: np.ndarray) -> dict[int, bytes]:
    bits = np.packbits(grid, bitorder="little").tobytes()
    gaps = np.diff(np.flatnonzero(grid), prepend=-1, append=grid.size) - 1
    skips = gaps // _SKIP
    written = np.full(int(skips.sum()) + gaps.size, _SKIP, np.uint8)
    written[np.cumsum(skips + 1) - 1] = gaps % _SKIP
    return {RAW: bits, DEFLATED: _deflate(bits), GAPS: _deflate(written.tobytes())}


def _deflate(data: bytes) -> bytes:
    # Random masks have no repeats to find, and Huffman codes alone come nearer to their entropy (docs/decisions.md).
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(data) + stream.flush()


def unpack(values: Tensor, blob: Tensor) -> Tensor:
    """The dense tensor, on the device of `values`.

    Raises:
        PackedError: if the two do not belong together, or either is damaged.
    """
    import torch

    bits = blob.detach().cpu().numpy()
    header = parse_mask(bits)
    if values.ndim != 1 or values.numel() != header.count:
        raise PackedError(f"there are {tuple(values.shape)} values, expected {header.count} in one dimension")
    if values.device.type != "cpu":
        dense = torch.zeros(header.numel, dtype=values.dtype, device=values.device)
        dense[torch.from_numpy(_live_weights(bits, header)).to(values.device)] = values
        return dense.view(header.shape)
    # numpy's assignment is the fast one, and does not know bfloat16: equally wide integers do.
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    live = values.detach().contiguous().view(kind).numpy()
    parts = _live_parts(bits, header) if header.block_size == 1 else [(_live_weights(bits, header), slice(None))]
    whole = np.zeros(header.numel, live.dtype)
    for places, part in parts:
        whole[places] = live[part]
    return torch.from_numpy(whole).view(values.dtype).view(header.shape)


def _live_weights(blob: np.ndarray, header: MaskHeader) -> np.ndarray:
    """Places of the live weights in the flattened tensor, ascending."""
    if header.block_size == 1:
        return live_blocks(blob, header)
    return np.flatnonzero(dense_mask(blob))
