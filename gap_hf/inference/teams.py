"""A kernel's work among threads."""

from __future__ import annotations

from llvmlite import ir

from gap_hf.inference.ir import I32, POINTER, Kernel, Variable
from gap_hf.inference.kernels import LAYER

_CALL = {"layer": "i64*", "x": "f32*", "bias": "f32*", "y": "f32*", "scratch": "f32*", "tokens": "int"}


def write_share(module: ir.Module, tiles: Kernel, tokens_of_tile: int, along: str) -> Kernel:
    """The part of thread `index` of `count`.

    Args:
        along: What is shared out: ``tokens`` or ``groups``, or ``either``: tokens where there are enough for all, else groups.
    """
    k = Kernel(module, "share", **_CALL, index="int", count="int")
    layer, tokens, index, count = k.array("layer"), k.arg("tokens"), k.arg("index"), k.arg("count")
    groups = layer[LAYER.index("groups")]
    first_token, last_token = Variable(k.int(0)), Variable(tokens)
    first_group, last_group = Variable(groups * index // count), Variable(groups * (index + 1) // count)
    least = {"tokens": k.int(0), "groups": tokens + 1, "either": count * tokens_of_tile}[along]
    with k.when(least < tokens + 1):
        num_tiles = (tokens + (tokens_of_tile - 1)) // tokens_of_tile
        first_token.set(num_tiles * index // count * tokens_of_tile)
        last_token.set((num_tiles * (index + 1) // count * tokens_of_tile).at_most(tokens))
        first_group.set(k.int(0))
        last_group.set(groups)
    arrays = [k.array(name) for name in ("layer", "x", "bias", "y")]
    scratch = k.array("scratch") + index * layer[LAYER.index("scratch")]
    limits = [limit.get() for limit in (first_token, last_token, first_group, last_group)]
    k.result(k.call(tiles, *arrays, scratch, tokens, *limits))
    return k


def write_team(module: ir.Module, share: Kernel) -> Kernel:
    """All parts on torch's own OpenMP threads: ``GOMP_parallel(body, task, threads, 0)`` is what compilers make of
    ``#pragma omp parallel num_threads(threads)``.
    """
    thread, count = (
        ir.Function(module, ir.FunctionType(I32, []), f"omp_get_{name}") for name in ("thread_num", "num_threads")
    )
    parallel = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, POINTER, I32, I32]), "GOMP_parallel")
    names = list(_CALL)

    body = Kernel(module, "body", task="i64*")
    task = body.array("task")
    given = [
        task[i] if _CALL[n] == "int" else body.array_at(task[i], _CALL[n].rstrip("*")) for i, n in enumerate(names)
    ]
    found = body.call(share, *given, body.call(thread).wide(), body.call(count).wide())
    with body.when(body.int(0) < found):
        task[len(names)] = found
    body.result(found)  # nobody reads it: a return value that the caller does not expect does no harm

    k = Kernel(module, "team", **_CALL, threads="int")
    task = k.local(len(names) + 1, "i64")
    for i, name in enumerate(names):
        task[i] = k.arg(name) if _CALL[name] == "int" else k.array(name).address()
    task[len(names)] = k.int(0)
    k.call(parallel, k.function_pointer(body), task, k.arg("threads").narrow(), k.int(0).narrow())
    k.result(task[len(names)])
    return k
