"""The sparse kernels: ``y = x @ weight.T + bias`` for a (N, K) weight that is mostly zeros, in fp32.

`x` is (M, K) and `y` is (M, N), both contiguous; M counts tokens. What follows is written once in `gap_hf.inference.ir`, and
LLVM makes AVX2, AVX-512 or NEON of it: a vector that is wider than a register becomes several registers.

**Blocks** (`write_blocks`): `width` outputs by one input live or die together. Outputs lie on the lanes of a vector, so each
live block is one vector of weights, one input, one multiply-add per token::

    for m in tiles of tokens:
        for g in groups of `width` outputs:
            acc[t] = bias[g]                                  for each token t of the tile, in registers
            for j in range(starts[g], starts[g + 1]):
                acc[t] += values[j] * x[m + t, columns[j]]    a vector of weights times one input
            y[m + t, g] = acc[t]

**Single weights** (`write_singles`): there is no vector of weights, so tokens lie on the lanes, and a tile of `x` is transposed
first::

    for m in tiles of `lanes` tokens:
        tile[k] = x[m : m + lanes, k]                         transposed once
        for n in outputs:
            acc = bias[n]
            for j in the live weights of n:
                acc += values[j] * tile[columns[j]]           one weight times a vector of tokens
            y[m : m + lanes, n] = acc                         transposed back, eight outputs at a time

With one or two tokens there is little to put on the lanes, so eight outputs lie there, each with its own inputs (sliced ELL: the
j-th live weights of eight neighbouring outputs lie side by side).

Every kernel returns how often it saw an input that is NaN or infinite: dense gives NaN for it times a masked weight, and a
sparse kernel does not, so the caller runs such an input dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from gap_hf.inference.ir import Array, Kernel, Value, Variable

# What a layer is, as addresses and sizes in an array of 64-bit integers; `gap_hf.inference.compiled` fills it.
LAYER = ("inputs", "outputs", "groups", "scratch", "starts", "columns", "values", "lengths")


@dataclass(frozen=True)
class Machine:
    """What a kernel is made for.

    Attributes:
        lanes: fp32 numbers in a vector register: 16 (AVX-512), 8 (AVX2) or 4 (NEON, SSE).
        registers: Vector registers.
    """

    lanes: int
    registers: int

    def registers_of(self, width: int) -> int:
        """Of one vector."""
        return max(1, width // self.lanes)

    def chains(self, width: int, vectors: int) -> int:
        """How many sums to keep, so that eight multiply-adds are under way: one takes four cycles and two start in each."""
        return max(1, 8 // (vectors * self.registers_of(width)))

    def tile(self, width: int) -> int:
        """Tokens whose accumulators fit into the registers, beside a vector of weights and an input. Their rows of `x` have to be
        found as well: with 16 registers for addresses 14 tokens were slower than 8.
        """
        each = self.registers_of(width)
        return max(1, min(self.registers // 2, 16, (self.registers - each - 1) // each))


RANGE = {
    "layer": "i64*",
    "x": "f32*",
    "bias": "f32*",
    "y": "f32*",
    "scratch": "f32*",
    "tokens": "int",
} | dict.fromkeys(("first_token", "last_token", "first_group", "last_group"), "int")


def layer_of(k: Kernel, values: str, columns: str) -> tuple[Value, Value, Array, Array, Array]:
    """K, N, where each group starts, and the column and the values of each live item."""
    fields: dict[str, Value] = dict(zip(LAYER, (k.array("layer")[i] for i in range(len(LAYER))), strict=True))
    arrays = (("starts", "i32"), ("columns", columns), ("values", values))
    starts, cols, vals = (k.array_at(fields[name], kind) for name, kind in arrays)
    return fields["inputs"], fields["outputs"], starts, cols, vals


def unrolled(
    k: Kernel, start: Value, stop: Value, chains: list[list[Variable]], add: Callable[[Value, list[Variable]], None]
) -> list[Value]:
    """Add up items `start` to `stop`, as many at a time as there are chains, so that no sum waits for the one before it."""
    whole = start + (stop - start) // len(chains) * len(chains)
    with k.loop(start, whole, len(chains)) as j:
        for i, chain in enumerate(chains):
            add(j + i, chain)
    if len(chains) > 1:
        with k.loop(whole, stop) as j:
            add(j, chains[0])
    totals = [sum_.get() for sum_ in chains[0]]
    for chain in chains[1:]:
        totals = [total + part.get() for total, part in zip(totals, chain, strict=True)]
    return totals


def chains_from(number: int, start: list[Value], zero: Value) -> list[list[Variable]]:
    """The first begins at `start`, which is the bias, the others at 0."""
    return [[Variable(value if i == 0 else zero) for value in start] for i in range(number)]


# --- blocks ----------------------------------------------------------------------------------------------------------


def write_blocks(module: ir.Module, machine: Machine, width: int, values: str, columns: str) -> Kernel:
    """Kernel of blocks of `width` outputs, which divides N.

    Args:
        values: ``f32`` or ``bf16``.
        columns: ``u16`` or ``i32``.
    """
    sizes = [machine.tile(width)]
    while sizes[-1] > 1:
        sizes.append(4 if 4 < sizes[-1] < 8 else sizes[-1] // 2)
    tiles = [(size, _block_tile(module, machine, width, size, values, columns)) for size in sizes]
    k = Kernel(module, "tiles", **RANGE)
    first, bad = k.arg("first_token"), k.int(0)
    for size, tile in tiles:
        last = first + (k.arg("last_token") - first) // size * size
        bad = bad + k.call(tile, *_given(k, first, last))
        first = last
    k.result(bad)
    return k


def _given(k: Kernel, first_token: Value, last_token: Value) -> list[Value | Array]:
    """The arguments of `k` with other tokens."""
    arrays = [k.array(name) for name in ("layer", "x", "bias", "y", "scratch")]
    return [*arrays, k.arg("tokens"), first_token, last_token, k.arg("first_group"), k.arg("last_group")]


def _block_tile(module: ir.Module, machine: Machine, width: int, size: int, values: str, columns: str) -> Kernel:
    """Some tokens, `size` at a time, times some groups of outputs."""
    k = Kernel(module, f"blocks_by_{size}", **RANGE)
    x, y, bias = k.array("x"), k.array("y"), k.array("bias")
    num_in, num_out, starts, cols, vals = layer_of(k, values, columns)
    bad = Variable(k.int(0))
    with k.loop(k.arg("first_token"), k.arg("last_token"), size) as m:
        rows = [x + (m + t) * num_in for t in range(size)]
        for row in rows:
            bad.set(bad.get() + _num_bad(k, row, num_in))
        with k.loop(k.arg("first_group"), k.arg("last_group")) as g:
            acc = chains_from(machine.chains(width, size), [bias.vector(g * width, width)] * size, k.zeros(width))

            def add(j: Value, sums: list[Variable]) -> None:
                weights, at = vals.vector(j * width, width), rows[0] + cols[j]
                for total in sums:
                    total.set(weights * at[0].spread(width) + total.get())
                    at = at + num_in

            totals = unrolled(k, starts[g], starts[g + 1], acc, add)
            for t, total in enumerate(totals):
                y[(m + t) * num_out + g * width] = total
    k.result(bad.get())
    return k


_STRIDE = 32  # floats that `_num_bad` looks at in one go


def _num_bad(k: Kernel, row: Array, length: Value) -> Value:
    """1 if a row holds NaN or an infinity, else 0: each of them times 0 is NaN, and every other number 0."""
    seen, zero = Variable(k.zeros(_STRIDE)), k.zeros(_STRIDE)
    whole = length // _STRIDE * _STRIDE
    with k.loop(0, whole, _STRIDE) as i:
        seen.set(row.vector(i, _STRIDE) * zero + seen.get())
    rest = Variable(seen.get().sum())
    with k.loop(whole, length) as i:
        rest.set(row[i] * k.float(0) + rest.get())
    return rest.get().is_nan()


SLICE = 8  # outputs of which the weights lie side by side; and the side of the squares that are transposed in registers
_FEW = 2  # tokens that are faster one after the other than on the lanes, most of which would be spare

# --- single weights --------------------------------------------------------------------------------------------------


def write_singles(module: ir.Module, machine: Machine, values: str, columns: str) -> Kernel:
    """Kernel of single weights; its groups are slices of eight outputs. `scratch` has to hold `scratch_size` floats."""
    lanes = lanes_of(machine)
    tiles = [(size, _lanes_tile(module, machine, size, values, columns)) for size in lanes]
    tiles.append((_FEW, _few_tokens(module, values, columns)))
    k = Kernel(module, "tiles", **RANGE)
    first, last = k.arg("first_token"), k.arg("last_token")
    whole = first + (last - first) // lanes[0] * lanes[0]
    bad = Variable(k.call(tiles[0][1], *_given(k, first, whole)))
    # What is left takes one more tile, the smallest that holds it, with lanes to spare.
    smaller = [size for size, _ in tiles[1:]] + [0]
    for (size, tile), below in zip(tiles, smaller, strict=True):
        with k.when(k.int(below) < last - whole), k.when(last - whole < size + 1):
            bad.set(bad.get() + k.call(tile, *_given(k, whole, last)))
    k.result(bad.get())
    return k


def lanes_of(machine: Machine) -> list[int]:
    """Numbers of tokens that a tile of single weights may have."""
    return [n * machine.lanes for n in (4, 2, 1) if n * machine.lanes >= SLICE]


def scratch_size(machine: Machine, num_in: int) -> int:
    """Floats that a thread needs: the transposed tile, and eight outputs of it."""
    return lanes_of(machine)[0] * (num_in + SLICE)


def _few_tokens(module: ir.Module, values: str, columns: str) -> Kernel:
    k = Kernel(module, "singles_by_1", **RANGE)
    num_in, num_out, starts, cols, vals = layer_of(k, values, columns)
    bias, last_sums, bad = k.array("bias"), k.local(SLICE, "f32"), Variable(k.int(0))
    with k.loop(k.arg("first_token"), k.arg("last_token")) as m:
        row, out = k.array("x") + m * num_in, k.array("y") + m * num_out
        with k.loop(k.arg("first_group"), k.arg("last_group")) as s:

            def add(j: Value, sums: list[Variable]) -> None:
                at = j * SLICE
                sums[0].set(vals.vector(at, SLICE) * row.at(cols, at, SLICE) + sums[0].get())

            zero = k.zeros(SLICE)
            (total,) = unrolled(k, starts[s], starts[s + 1], chains_from(2, [zero], zero), add)
            n, left = s * SLICE, num_out - s * SLICE
            with k.when(k.int(SLICE - 1) < left):
                out[n] = total + bias.vector(n, SLICE)
            with k.when(left < SLICE):
                last_sums[0] = total
                with k.loop(0, left) as o:
                    out[n + o] = last_sums[o] + bias[n + o]
        bad.set(bad.get() + _num_bad(k, row, num_in))
    k.result(bad.get())
    return k


def _lanes_tile(module: ir.Module, machine: Machine, size: int, values: str, columns: str) -> Kernel:
    """Some tokens, `size` at a time, of which the last tile may have fewer, times some outputs."""
    k = Kernel(module, f"singles_by_{size}", **RANGE)
    x, y, bias, tile = k.array("x"), k.array("y"), k.array("bias"), k.array("scratch")
    num_in, num_out, starts, cols, vals = layer_of(k, values, columns)
    last_token, lengths = k.arg("last_token"), k.array_at(k.array("layer")[LAYER.index("lengths")], "i32")
    sums_of_eight = tile + num_in * size
    bad = Variable(k.int(0))
    with k.loop(k.arg("first_token"), last_token, size) as m:
        with k.loop(0, k.int(size), SLICE) as t:  # spare lanes repeat the last token
            rows = [x + (m + t + i).at_most(last_token - 1) * num_in for i in range(SLICE)]
            bad.set(bad.get() + transpose_in(k, rows, num_in, tile + t, size))
        with k.loop(k.arg("first_group"), k.arg("last_group")) as s:
            n = s * SLICE
            num_here = (num_out - n).at_most(SLICE)
            with k.loop(0, num_here) as o:
                first = starts[s] * SLICE + o

                def add(j: Value, sums: list[Variable]) -> None:
                    at = first + j * SLICE
                    sums[0].set(vals[at].spread(size) * tile.vector(cols[at] * size, size) + sums[0].get())

                chains = chains_from(machine.chains(size, 1), [bias[n + o].spread(size)], k.zeros(size))
                (sums_of_eight[o * size],) = unrolled(k, k.int(0), lengths[n + o], chains, add)
            with k.loop(0, k.int(size), SLICE) as t:
                transpose_out(k, sums_of_eight + t, size, y + n, num_out, num_here, m + t, last_token)
    k.result(bad.get())
    return k


def transpose_in(k: Kernel, rows: list[Array], length: Value, tile: Array, size: int) -> Value:
    """Eight rows of `x` become eight columns of the tile. Returns 1 if one of them holds NaN or an infinity, else 0."""
    seen = Variable(k.zeros(SLICE))
    whole = length // SLICE * SLICE
    with k.loop(0, whole, SLICE) as i:
        vectors = [row.vector(i, SLICE) for row in rows]
        for vector in vectors:
            seen.set(vector * k.zeros(SLICE) + seen.get())
        for j, vector in enumerate(_transposed(vectors)):
            tile[(i + j) * size] = vector
    rest = Variable(seen.get().sum())
    with k.loop(whole, length) as i:
        for t, row in enumerate(rows):
            rest.set(row[i] * k.float(0) + rest.get())
            tile[i * size + t] = row[i]
    return rest.get().is_nan()


def transpose_out(
    k: Kernel, sums: Array, size: int, y: Array, num_out: Value, count: Value, m: Value, last_token: Value
) -> None:
    """Sums of eight tokens, a row for each of `count` outputs, eight at most, go to the rows of `y`."""
    with k.when(count < SLICE), k.loop(0, count) as o:
        for t in range(SLICE):
            with k.when(m + t < last_token):
                y[(m + t) * num_out + o] = sums[o * size + t]
    with k.when(k.int(SLICE - 1) < count):
        for t, vector in enumerate(_transposed([sums.vector(o * size, SLICE) for o in range(SLICE)])):
            with k.when(m + t < last_token):
                y[(m + t) * num_out] = vector


def _transposed(rows: list[Value]) -> list[Value]:
    """Of a square of registers: halves of rows 4 apart change places, then quarters 2 apart, then neighbours."""
    for step in (4, 2, 1):
        upper = [i for i in range(SLICE) if not i & step]
        out = list(rows)
        for i in upper:
            first, second = rows[i], rows[i + step]
            # Place j of the first half of each pair stays; the other half is the partner's.
            out[i] = first.pick(second, [j if not j & step else SLICE + (j ^ step) for j in range(SLICE)])
            out[i + step] = first.pick(second, [j | step if not j & step else SLICE + j for j in range(SLICE)])
        rows = out
    return rows
