"""Slow, plain references that the tests step beside the clever paths. Pure Python and numpy, nothing from gap_hf."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np


def exact_keep(sparsity: Fraction, num_units: int) -> int:
    """The integer nearest to (1 - s) N; of two equally near the larger."""
    wanted = (1 - sparsity) * num_units
    below = wanted.numerator // wanted.denominator
    return min((below, below + 1), key=lambda k: (abs(k - wanted), -k))


def largest_mask(values: Sequence[float], keep: int) -> np.ndarray:
    """uint8 mask of the `keep` largest magnitudes; ties to the lowest index."""
    order = sorted(range(len(values)), key=lambda i: (-abs(float(values[i])), i))
    mask = np.zeros(len(values), dtype=np.uint8)
    for i in order[:keep]:
        mask[i] = 1
    return mask


def pooled_masks(arrays: Sequence[np.ndarray], keep: int) -> list[np.ndarray]:
    """One mask per array under a single threshold; ties to the earlier array, then to the lower index."""
    flat = np.concatenate([a.reshape(-1).astype(np.float64) for a in arrays])
    mask = largest_mask(flat.tolist(), keep)
    ends = np.cumsum([a.size for a in arrays])[:-1]
    return [part.reshape(a.shape) for part, a in zip(np.split(mask, ends), arrays, strict=True)]


def as_matrices(array: np.ndarray, layout: str) -> list[np.ndarray]:
    """Copies of a weight's (outputs, inputs) matrices: one per expert or kernel position, else one."""
    if layout == "out_in":
        return [array.copy()]
    if layout == "in_out":
        return [array.T.copy()]
    if layout == "expert_out_in":
        return [expert.copy() for expert in array]
    if layout == "expert_in_out":
        return [expert.T.copy() for expert in array]
    assert layout == "conv"
    positions = itertools.product(*(range(n) for n in array.shape[2:]))
    return [array[(slice(None), slice(None), *position)].copy() for position in positions]


def from_matrices(matrices: Sequence[np.ndarray], layout: str, shape: Sequence[int]) -> np.ndarray:
    """Undo `as_matrices`."""
    out = np.zeros(tuple(shape), dtype=matrices[0].dtype)
    if layout == "out_in":
        out[:] = matrices[0]
    elif layout == "in_out":
        out[:] = matrices[0].T
    elif layout in ("expert_out_in", "expert_in_out"):
        for i, matrix in enumerate(matrices):
            out[i] = matrix if layout == "expert_out_in" else matrix.T
    else:
        for position, matrix in zip(itertools.product(*(range(n) for n in shape[2:])), matrices, strict=True):
            out[(slice(None), slice(None), *position)] = matrix
    return out


def n_of_m_mask(array: np.ndarray, n: int, m: int, layout: str) -> np.ndarray:
    """Of every m consecutive inputs of an output, the n of largest magnitude."""
    masks = []
    for matrix in as_matrices(array, layout):
        mask = np.zeros(matrix.shape, dtype=np.uint8)
        for row in range(matrix.shape[0]):
            for start in range(0, matrix.shape[1], m):
                mask[row, start : start + m] = largest_mask(matrix[row, start : start + m].tolist(), n)
        masks.append(mask)
    return from_matrices(masks, layout, array.shape)


def block_mask(array: np.ndarray, rows: int, cols: int, keep: int, layout: str) -> np.ndarray:
    """The `keep` blocks of largest summed magnitude; blocks in order of matrix, block row, block column."""
    matrices = as_matrices(array.astype(np.float64), layout)
    places = [
        (index, row, col)
        for index, matrix in enumerate(matrices)
        for row in range(0, matrix.shape[0], rows)
        for col in range(0, matrix.shape[1], cols)
    ]
    scores = [float(np.abs(matrices[i][r : r + rows, c : c + cols]).sum()) for i, r, c in places]
    masks = [np.zeros(matrix.shape, dtype=np.uint8) for matrix in matrices]
    for (i, r, c), live in zip(places, largest_mask(scores, keep), strict=True):
        masks[i][r : r + rows, c : c + cols] = live
    return from_matrices(masks, layout, array.shape)


def all_transposable_tiles() -> list[np.ndarray]:
    """Every 4 x 4 mask with two ones in each row and column, by trying all 2^16, in lexicographic order."""
    found = []
    for bits in itertools.product((0, 1), repeat=16):
        tile = np.array(bits, dtype=np.uint8).reshape(4, 4)
        if (tile.sum(0) == 2).all() and (tile.sum(1) == 2).all():
            found.append(tile)
    # Rows were enumerated (0, 0, 1, 1) first; keeping the left columns first is the stated order of ties.
    return found[::-1]


def transposable_mask(array: np.ndarray, layout: str, tiles: Sequence[np.ndarray]) -> np.ndarray:
    """The tile that keeps the largest magnitude in each 4 x 4 block; ties to the first of `tiles`."""
    masks = []
    for matrix in as_matrices(array.astype(np.float64), layout):
        mask = np.zeros(matrix.shape, dtype=np.uint8)
        for row in range(0, matrix.shape[0], 4):
            for col in range(0, matrix.shape[1], 4):
                block = np.abs(matrix[row : row + 4, col : col + 4])
                mask[row : row + 4, col : col + 4] = max(
                    tiles, key=lambda tile, block=block: float(block[tile == 1].sum())
                )
        masks.append(mask)
    return from_matrices(masks, layout, array.shape)


def erk_counts(raw: Sequence[Fraction], units: Sequence[int], total: int) -> list[int]:
    """Erdős–Rényi-Kernel by water filling: the densest layers are full, the rest shares `total` as `raw` says.

    Tries every number of full layers, from the largest `raw` down, and takes the first with no density above 1.
    """
    order = sorted(range(len(units)), key=lambda j: (-raw[j], j))
    density: dict[int, Fraction] = {}
    for num_full in range(len(units) + 1):
        full, rest = order[:num_full], order[num_full:]
        left = Fraction(total - sum(units[j] for j in full))
        weight = sum((raw[j] * units[j] for j in rest), Fraction(0))
        density = {j: Fraction(1) for j in full} | {j: raw[j] * left / weight for j in rest}
        if all(d <= 1 for d in density.values()):
            break
    exact = [density[j] * units[j] for j in range(len(units))]
    counts = [x.numerator // x.denominator for x in exact]
    for j in sorted(range(len(units)), key=lambda j: (counts[j] - exact[j], j))[: total - sum(counts)]:
        counts[j] += 1
    return counts


def even_phase_ends(num_phases: int, before_fine_tune: int) -> list[int]:
    """Ends of phases that differ by one step at most, by dealing the steps out to the phases in turn."""
    ends, phase = [0] * num_phases, 0
    for step in range(1, before_fine_tune + 1):
        # Step number `step` is the last of every phase whose fair share it completes.
        while phase < num_phases and step * num_phases > before_fine_tune * (phase + 1):
            phase += 1
        ends[phase] = step
    return ends


def phase_index(lengths: Sequence[int], step: int) -> int:
    """Which phase a step is in, by walking through them."""
    for index, length in enumerate(lengths):
        if step < length:
            return index
        step -= length
    return len(lengths) - 1


class EntryAdam:
    """Adam (Kingma and Ba 2015) with a step count of its own for every entry: what a reset should come near to."""

    def __init__(self, size: int, *, beta1: float, beta2: float, eps: float = 1e-8) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.first, self.second, self.count = np.zeros(size), np.zeros(size), np.zeros(size)

    def reset(self, entries: np.ndarray) -> None:
        """Entries where the boolean array is true start anew."""
        for state in (self.first, self.second, self.count):
            state[entries] = 0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        """The update in units of the learning rate, to be subtracted."""
        self.count += 1
        self.first = self.beta1 * self.first + (1 - self.beta1) * gradient
        self.second = self.beta2 * self.second + (1 - self.beta2) * gradient**2
        first, second = self.corrected()
        return first / (np.sqrt(second) + self.eps)

    def corrected(self) -> tuple[np.ndarray, np.ndarray]:
        """Bias-corrected moments."""
        return self.first / (1 - self.beta1**self.count), self.second / (1 - self.beta2**self.count)


def cyclic_gap(
    weights: dict[str, np.ndarray],
    first_masks: dict[str, np.ndarray],
    groups: Sequence[Sequence[str]],
    *,
    num_rounds: int,
    sparsity: Fraction,
    phase_lengths: Sequence[int],
    fine_tune_length: int,
    gradient: Callable[[str, np.ndarray], np.ndarray],
    learning_rate: float,
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray | None]]]:
    """C-GaP as the paper's algorithm 1 has it, with plain SGD: weights and masks (None is dense) after every step.

    Grow and prune happen at the end of the step that they follow, so they show in that step's entry.
    """
    weights = {name: w.copy() for name, w in weights.items()}
    masks: dict[str, np.ndarray | None] = {}
    history = []

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            for name, w in weights.items():
                mask = masks[name]
                update = learning_rate * gradient(name, w)
                w -= update if mask is None else update * mask
            history.append(({n: w.copy() for n, w in weights.items()}, dict(masks)))

    def prune(group: Sequence[str]) -> None:
        for name in group:
            w = weights[name]
            mask = largest_mask(w.reshape(-1).tolist(), exact_keep(sparsity, w.size)).reshape(w.shape)
            masks[name] = mask
            w[mask == 0] = 0.0

    def grow(group: Sequence[str]) -> None:
        for name in group:
            masks[name] = None

    def amend() -> None:
        history[-1] = ({n: w.copy() for n, w in weights.items()}, dict(masks))

    for number, group in enumerate(groups):
        for name in group:
            masks[name] = None if number == 0 else first_masks[name]
            if number > 0:
                weights[name][first_masks[name] == 0] = 0.0
    lengths = iter(phase_lengths)
    train(next(lengths))
    for _ in range(num_rounds):
        for i in range(len(groups)):
            prune(groups[i])
            grow(groups[(i + 1) % len(groups)])
            amend()
            train(next(lengths))
    prune(groups[0])
    amend()
    train(fine_tune_length)
    return history


def dropped(values: Sequence[float], mask: Sequence[int], share: Fraction) -> list[int]:
    """The mask without the smallest `share` of its live weights, to the nearest; of equal ones the last goes first."""
    live = [i for i, m in enumerate(mask) if m]
    num_dropped = exact_keep(1 - share, len(live))
    goes = sorted(live, key=lambda i: (abs(float(values[i])), -i))[:num_dropped]
    return [int(m and i not in goes) for i, m in enumerate(mask)]


def grown(mask: Sequence[int], scores: Sequence[float], keep: int) -> list[int]:
    """The mask with what it lacks to `keep` weights grown, the largest scores first; ties to the lowest index."""
    order = sorted((i for i, m in enumerate(mask) if not m), key=lambda i: (-abs(float(scores[i])), i))
    grows = set(order[: keep - sum(mask)])
    return [int(bool(m) or i in grows) for i, m in enumerate(mask)]


def sent_and_received(
    tensors: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], pack_below: float
) -> tuple[list[float], list[np.ndarray]]:
    """What a rank sends of a bucket's gradients, in any order, and each gradient as it is if that comes back unchanged."""
    sent: list[float] = []
    received = []
    for tensor, mask in zip(tensors, masks, strict=True):
        if mask is None or mask.sum() >= pack_below * mask.size:
            sent += tensor.reshape(-1).tolist()
            received.append(tensor)
            continue
        for value, live in zip(tensor.reshape(-1).tolist(), mask.reshape(-1).tolist(), strict=True):
            if live:
                sent.append(value)
        received.append(np.where(mask == 1, tensor, 0).astype(tensor.dtype))
    return sent, received


# --- points ----------------------------------------------------------------------------------------------------------


def farthest_points(points: np.ndarray, num: int) -> list[int]:
    """Of points (n, 3): the first, then again and again the one whose nearest chosen point is farthest; ties to the lowest."""
    chosen = [0]
    while len(chosen) < num:
        gaps = [min(float(((p - points[c]) ** 2).sum()) for c in chosen) for p in points]
        chosen.append(max(range(len(points)), key=lambda i: (gaps[i], -i)))
    return chosen


def ball_neighbours(points: np.ndarray, centre: np.ndarray, radius: float, num: int) -> list[int]:
    """The first `num` points, by index, within `radius` of the centre; the first of them repeated where there are fewer."""
    inside = [i for i, p in enumerate(points) if float(np.sqrt(((p - centre) ** 2).sum())) <= radius][:num]
    return inside + [inside[0]] * (num - len(inside))


def interpolated(values: np.ndarray, points: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Values (n, c) at points (n, 3) read at one query (3,): the three nearest, weighted by 1 / squared distance."""
    squares = [max(float(((p - query) ** 2).sum()), 1e-10) for p in points]
    near = sorted(range(len(points)), key=lambda i: (squares[i], i))[:3]
    weights = [1 / squares[i] for i in near]
    return sum(w * values[i] for w, i in zip(weights, near, strict=True)) / sum(weights)
