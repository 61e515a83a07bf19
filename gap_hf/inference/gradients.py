"""Kernels of the gradients of a sparse layer, for training. They follow `gap_hf.inference.kernels`, whose structures they take.

The gradient of the **weight** is made at its live entries alone: ``gradient[n, k] = sum over m of gy[m, n] * x[m, k]``. `x` comes
transposed, (K, M), so that all tokens of an input lie side by side, and M is a multiple of `PAD`: what fills it up is 0.
Every sum is over the tokens in their order, so a gradient does not depend on the number of threads. It is written to its
place in a dense gradient, which lies by rows or by columns; at masked weights that is not touched.

**Blocks**: `gy` comes as (N / width, M, width). A few blocks of one group at a time, so that the outputs' gradients are read
once for all of them::

    for g in groups of `width` outputs:
        for a few blocks j of g:
            acc[j] += gy[g, m] * x[columns[j], m]             for each token m, acc in registers
            gradient[g, columns[j]] = acc[j]

**Single weights**: `gy` comes as (N, M). Tokens lie on the lanes, and are added up at the end::

    for n in outputs:
        for a few live weights j of n:
            acc[j] += gy[n, m : m + lanes] * x[columns[j], m : m + lanes]
            gradient[n, columns[j]] = sum(acc[j])

The gradient of the **input** of blocks, ``gx = gy @ weight``, takes the weight as it lies for the output. Tokens lie on the
lanes, tiles of `gy` and of `gx` are transposed, and what a few blocks of a group add to `gx` is held in registers::

    for m in tiles of tokens:
        tile[n] = gy[m : m + lanes, n];  sums[k] = 0
        for g in groups of `width` outputs:
            for a few blocks j of g:
                for n in outputs of g:
                    sums[columns[j]] += values[j, n] * tile[n]    one weight times a vector of tokens
        gx[m : m + lanes, k] = sums[k]

That of single weights is `write_singles` of the transposed weight.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from gap_hf.inference.ir import Array, Kernel, Value, Variable
from gap_hf.inference.kernels import (
    LAYER,
    RANGE,
    SLICE,
    Machine,
    chains_from,
    layer_of,
    transpose_in,
    transpose_out,
    unrolled,
)

PAD = 32  # tokens
# What a layer is for a gradient of its weight: how far apart neighbours of a column and of a row lie in it.
PLACED_LAYER = (*LAYER, "row_stride", "column_stride")


def _placed(k: Kernel, output: Value, column: Value) -> Array:
    """The place of one entry in the dense gradient."""
    row_stride, column_stride = (k.array("layer")[PLACED_LAYER.index(n)] for n in ("row_stride", "column_stride"))
    return k.array("y") + (output * row_stride + column * column_stride)


def write_block_gradients(module: ir.Module, machine: Machine, width: int, columns: str) -> Kernel:
    """Arguments as of the products: `bias` are the gradients of the output, `y` that of the weight, `layer` is `PLACED_LAYER`."""
    k = Kernel(module, "tiles", **RANGE)
    x, gy, tokens = k.array("x"), k.array("bias"), k.arg("tokens")
    row_stride = k.array("layer")[PLACED_LAYER.index("row_stride")]
    _, _, starts, cols, _ = layer_of(k, "f32", columns)

    def some_blocks(first: Value, size: int, output: Value, of_group: Array) -> None:
        rows = [x + cols[first + i] * tokens for i in range(size)]

        def add(m: Value, sums: list[Variable]) -> None:
            outputs = of_group.vector(m * width, width)
            for row, total in zip(rows, sums, strict=True):
                total.set(outputs * row[m].spread(width) + total.get())

        chains = chains_from(machine.chains(width, size), [k.zeros(width)] * size, k.zeros(width))
        for i, total in enumerate(unrolled(k, k.int(0), tokens, chains, add)):
            place = _placed(k, output, cols[first + i])
            for n in range(width):
                place[row_stride * n] = total.place(n)

    with k.loop(k.arg("first_group"), k.arg("last_group")) as g:
        of_group = gy + g * tokens * width
        output = g * width
        _in_sizes(
            k, starts[g], starts[g + 1], machine.tile(width), lambda first, n: some_blocks(first, n, output, of_group)
        )
    k.result(k.int(0))
    return k


def write_single_gradients(module: ir.Module, machine: Machine, columns: str) -> Kernel:
    """As of blocks."""
    k = Kernel(module, "tiles", **RANGE)
    x, gy, tokens = k.array("x"), k.array("bias"), k.arg("tokens")
    _, num_out, starts, cols, _ = layer_of(k, "f32", columns)
    lengths = k.array_at(k.array("layer")[LAYER.index("lengths")], "i32")
    lanes = 2 * machine.lanes

    def some_weights(first: Value, size: int, at: Value, output: Value) -> None:
        columns_ = [cols[at + (first + i) * SLICE] for i in range(size)]
        rows, row_of_output = [x + column * tokens for column in columns_], gy + output * tokens
        chains = chains_from(machine.chains(lanes, size), [k.zeros(lanes)] * size, k.zeros(lanes))

        def add(i: Value, sums: list[Variable]) -> None:
            m = i * lanes
            outputs = row_of_output.vector(m, lanes)
            for row, total in zip(rows, sums, strict=True):
                total.set(outputs * row.vector(m, lanes) + total.get())

        for column, total in zip(columns_, unrolled(k, k.int(0), tokens // lanes, chains, add), strict=True):
            _placed(k, output, column)[0] = total.sum()

    def some_outputs(s: Value) -> None:
        with k.loop(0, (num_out - s * SLICE).at_most(SLICE)) as o:
            n, at = s * SLICE + o, starts[s] * SLICE + o
            _in_sizes(k, k.int(0), lengths[n], 4, lambda first, size: some_weights(first, size, at, n))

    with k.loop(k.arg("first_group"), k.arg("last_group")) as s:
        some_outputs(s)
    k.result(k.int(0))
    return k


def tokens_of(machine: Machine) -> int:
    """Of a tile of `write_block_inputs`: two registers of them."""
    return max(SLICE, 2 * machine.lanes)


def write_block_inputs(module: ir.Module, machine: Machine, width: int, columns: str) -> Kernel:
    """The gradient of the input: `x` is that of the output, (M, N), and `y` the result, (M, K). `scratch` has to hold
    ``tokens_of(machine) * (N + K + SLICE)`` floats. It returns how many rows of `x` are not finite.
    """
    k = Kernel(module, "tiles", **RANGE)
    size = tokens_of(machine)
    gy, gx, last_token = k.array("x"), k.array("y"), k.arg("last_token")
    num_in, num_out, starts, cols, vals = layer_of(k, "f32", columns)
    tile = k.array("scratch")
    sums, bad = tile + num_out * size, Variable(k.int(0))

    def some_blocks(first: Value, count: int, of_group: Array) -> None:
        rows = [sums + cols[first + i] * size for i in range(count)]
        totals = [Variable(row.vector(0, size)) for row in rows]
        with k.loop(0, k.int(width)) as n:
            outputs = of_group.vector(n * size, size)
            for i, total in enumerate(totals):
                total.set(vals[(first + i) * width + n].spread(size) * outputs + total.get())
        for row, total in zip(rows, totals, strict=True):
            row[0] = total.get()

    with k.loop(k.arg("first_token"), last_token, size) as m:
        with k.loop(0, k.int(size), SLICE) as t:  # spare lanes repeat the last token
            rows = [gy + (m + t + i).at_most(last_token - 1) * num_out for i in range(SLICE)]
            bad.set(bad.get() + transpose_in(k, rows, num_out, tile + t, size))
        with k.loop(0, num_in) as column:
            sums[column * size] = k.zeros(size)
        with k.loop(k.arg("first_group"), k.arg("last_group")) as g:
            of_group = tile + g * width * size
            _in_sizes(k, starts[g], starts[g + 1], 4, lambda first, count: some_blocks(first, count, of_group))
        with k.loop(0, num_in, SLICE) as column:
            count = (num_in - column).at_most(SLICE)
            with k.loop(0, k.int(size), SLICE) as t:
                transpose_out(k, sums + column * size + t, size, gx + column, num_in, count, m + t, last_token)
    k.result(bad.get())
    return k


def _in_sizes(k: Kernel, start: Value, stop: Value, largest: int, some: Callable[[Value, int], None]) -> None:
    """Do items `start` to `stop`, `largest` at a time, and what is left half as many at a time, down to one."""
    size, first = largest, start
    while size:
        last = first + (stop - first) // size * size
        with k.loop(first, last, size) as j:
            some(j, size)
        first, size = last, size // 2
