"""Parts of tensors, and selection over them, without processes: threads stand for ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gap_hf import largest
from gap_hf.errors import GaPError
from gap_hf.pattern_names import parse_pattern
from gap_hf.patterns import magnitude_mask, num_units, pooled_masks
from gap_hf.shards import Part, Peers, class_of, exchange, local, part_of, reshard, total_counts, whole

SHAPES = {
    "out_in": [(5, 8), (8, 8), (20, 4), (1, 4), (9, 12), (12, 8)],
    "in_out": [(8, 5), (20, 4), (4, 12)],
    "conv": [(5, 8, 3), (8, 4, 1), (12, 4, 2, 2)],
    "expert_out_in": [(3, 4, 8), (5, 4, 4)],
    "expert_in_out": [(3, 8, 4), (1, 4, 4)],
}


class Board:
    """Where threads leave what they send."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=30)
        self.slots: list[Any] = [None] * num_ranks


@dataclass(frozen=True)
class Threads(Peers):
    board: Any = None

    def gather(self, mine: Tensor) -> Tensor:
        self.board.slots[self.rank] = mine
        self.board.barrier.wait()
        found = torch.stack(list(self.board.slots))
        self.board.barrier.wait()
        return found

    def add_up(self, counts: Tensor) -> Tensor:
        return self.gather(counts).sum(dim=0)


def on_ranks(num_ranks: int, work: Callable[[Peers], Any]) -> list[Any]:
    """What `work` returns or raises on each of so many ranks."""
    board, out = Board(num_ranks), [None] * num_ranks

    def run(rank: int) -> None:
        try:
            out[rank] = work(Threads(group="threads", rank=rank, num_ranks=num_ranks, board=board))  # type: ignore[arg-type]
        except GaPError as error:
            out[rank] = error
        except BaseException:
            board.barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def part(shape: tuple[int, ...], peers: Peers) -> Part:
    return Part(shape, -(-shape[0] // peers.num_ranks), peers)


def test_a_plain_tensor_is_whole_and_nothing_is_copied() -> None:
    tensor = nn.Parameter(torch.arange(12.0).view(3, 4))
    found = part_of(tensor, "w")
    assert found == whole((3, 4))
    assert (found.numel, found.rows, found.local_shape) == (12, range(3), (3, 4))
    assert found.cut(tensor) is tensor and found.gather(tensor) is tensor and local(tensor) is tensor
    assert found.units(4) == whole((3,)) and found.dealt(5) == whole((5,))
    assert total_counts([3, 4], [found, whole((1,))]) == [3, 4]
    assert exchange([0.1], [found]) == [[0.1]]
    counts = torch.arange(3)
    assert found.peers.add_up(counts) is counts


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 9])
def test_rows_are_dealt_as_chunk_does(num_ranks: int, num_rows: int) -> None:
    tensor = torch.arange(num_rows * 6.0).view(num_rows, 2, 3)
    chunks = list(tensor.chunk(num_ranks))
    chunks += [tensor[:0]] * (num_ranks - len(chunks))

    def work(peers: Peers) -> Tensor:
        mine = part(tuple(tensor.shape), peers)
        assert torch.equal(mine.cut(tensor), chunks[peers.rank])
        assert mine.local_shape == chunks[peers.rank].shape
        units = mine.units(3)
        assert (units.numel, len(units.rows)) == (num_rows * 2, chunks[peers.rank].numel() // 3)
        assert exchange([peers.rank, 1], [mine, mine]) == [list(range(num_ranks)), [1] * num_ranks]
        return mine.gather(mine.cut(tensor))

    assert all(torch.equal(found, tensor) for found in on_ranks(num_ranks, work))


def test_a_cut_frees_the_rest() -> None:
    tensor = torch.zeros(8, 8)
    (first, _) = on_ranks(2, lambda peers: part((8, 8), peers).cut(tensor))
    assert first.untyped_storage().nbytes() == tensor.nbytes // 2


def fitting(text: str) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and layouts that a pattern divides."""
    pattern, found = parse_pattern(text), []
    rows, cols = {"block": (pattern.rows, pattern.cols), "transposable": (4, 4), "n:m": (1, pattern.m)}.get(
        pattern.kind, (1, 1)
    )
    for layout, shapes in SHAPES.items():
        for shape in shapes:
            out, into = {"out_in": shape[:2], "conv": shape[:2], "expert_out_in": shape[1:]}.get(
                layout, shape[-2:][::-1]
            )
            if out % rows == 0 and into % cols == 0:
                found.append((shape, layout))
    assert len({layout for _, layout in found}) == len(SHAPES), text
    return found


@pytest.mark.parametrize("num_ranks", [3, 4])
@pytest.mark.parametrize("text", ["unstructured", "2:4", "block:1x4", "block:4x1", "block:2x2", "transposable:2:4"])
def test_masks_of_parts_are_parts_of_the_mask(text: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "CHUNK", 7)
    pattern, generator = parse_pattern(text), torch.Generator().manual_seed(0)
    tensors = []
    for shape, layout in fitting(text):
        drawn = torch.randn(shape, generator=generator)
        # Of few values: ties everywhere, zeros among them.
        tensors += [(drawn.round() if len(tensors) % 2 else drawn, layout)]
    for tensor, layout in tensors:
        units = num_units(tensor.shape, pattern)
        lowest = 0 if pattern.fixed_sparsity is None else units - int(units * pattern.fixed_sparsity)
        for keep in sorted({max(lowest, k) for k in (units // 3, units - 2)}):
            wanted = magnitude_mask(tensor, pattern, keep, layout)

            def work(peers: Peers, tensor=tensor, layout=layout, keep=keep) -> Tensor:
                mine = part(tuple(tensor.shape), peers)
                return mine.gather(magnitude_mask(mine.cut(tensor), pattern, keep, layout, "w", mine))

            assert all(torch.equal(found, wanted) for found in on_ranks(num_ranks, work)), (layout, tensor.shape, keep)
    if pattern.fixed_sparsity is not None:
        return
    weights, layouts = zip(*tensors, strict=True)
    names, total = ["w"] * len(weights), sum(num_units(t.shape, pattern) for t in weights)
    within = [(t > 0).to(torch.uint8) for t in weights]
    for live in (None, within):
        for keep in (total // 5, total - 1):
            wanted = pooled_masks(weights, pattern, keep, layouts, names, live)

            def work(peers: Peers, live=live, keep=keep) -> list[Tensor]:
                parts = [part(tuple(t.shape), peers) for t in weights]
                mine = [p.cut(t) for p, t in zip(parts, weights, strict=True)]
                flags = None if live is None else [p.cut(m) for p, m in zip(parts, live, strict=True)]
                masks = pooled_masks(mine, pattern, keep, layouts, names, flags, parts)
                return [p.gather(m) for p, m in zip(parts, masks, strict=True)]

            for found in on_ranks(num_ranks, work):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), keep


@pytest.mark.parametrize("text", ["unstructured", "2:4", "block:4x1"])
def test_nan_on_one_rank_stops_all(text: str) -> None:
    tensor = torch.ones(8, 8)
    tensor[7, 0] = float("nan")

    def work(peers: Peers) -> Tensor:
        mine = part((8, 8), peers)
        return magnitude_mask(
            mine.cut(tensor), parse_pattern(text), 32 if text == "2:4" else 8, "out_in", "layer.weight", mine
        )

    for found in on_ranks(3, work):
        assert isinstance(found, GaPError) and str(found).startswith("layer.weight: holds NaN"), found


def test_a_plain_module_has_its_own_class_and_nothing_to_reshard() -> None:
    module = nn.Linear(2, 2)
    reshard(module)
    assert class_of(module) is nn.Linear
