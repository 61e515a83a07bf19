"""Compiling the kernels with llvmlite, once in a process for each width and type, and calling them."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_lock = threading.Lock()
_state = {"warned": False, "broken": False, "forked": False}


@dataclass(frozen=True)
class Compiled:
    """A kernel in memory.

    Attributes:
        share: ``(layer, x, bias, y, scratch, tokens, index, count)``, all but the last three addresses: does part `index`
            of `count` and returns how many rows of `x` it saw that are not finite.
        team: ``(layer, x, bias, y, scratch, tokens, threads)``: all parts on so many OpenMP threads; None where
            torch's OpenMP cannot be called, and then one thread does all.
        scratch: Floats of scratch that a thread needs, given the numbers of outputs and inputs.
        owner: What keeps the code alive.
    """

    share: Callable[..., int]
    team: Callable[..., int] | None
    scratch: Callable[[int, int], int]
    owner: Any

    def threads(self, wanted: int) -> int:
        """How many it can have here."""
        return 1 if self.team is None or has_forked() else wanted

    def run(self, call: tuple[int | None, ...], threads: int) -> int:
        """All of it on so many threads, no more than `threads` allows."""
        return self.share(*call, 0, 1) if threads == 1 or self.team is None else self.team(*call, threads)


def available() -> bool:
    """Whether kernels can be compiled here; if not, one warning in the life of the process says why."""
    return not _state["broken"] and _llvm() is not None


def kernel(kind: str, width: int, values: str, columns: str) -> Compiled | None:
    """A kernel, or None, with one warning, where it cannot be made.

    Args:
        kind: ``blocks`` of `width` outputs or ``singles``; and of `gap_hf.inference.gradients` ``block inputs``, ``block gradients`` and
            ``single gradients``.
        values: ``f32`` or ``bf16``.
        columns: ``u16`` or ``i32``.
    """
    if not available():
        return None
    try:
        with _lock:
            return _compile(kind, width, values, columns)
    except (RuntimeError, OSError, AttributeError, TypeError, NotImplementedError) as error:
        _state["broken"] = True
        _warn(f"llvmlite could not compile a kernel ({type(error).__name__}: {error})")
        return None


def has_forked() -> bool:
    """In a forked child a kernel has one thread: its parent's OpenMP threads do not exist there, and would be waited for."""
    return _state["forked"]


@functools.cache
def cpu_name() -> str:
    llvm = _llvm()
    return platform.processor() or platform.machine() if llvm is None else llvm.get_host_cpu_name()


def _warn(reason: str) -> None:
    if not _state["warned"]:
        _state["warned"] = True
        logger.warning(
            "%s; sparse layers use torch's own operations instead, which are slower. pip install 'gap_hf[inference]' has it.",
            reason,
        )


@functools.cache
def _llvm() -> Any:
    try:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    except (ImportError, OSError, RuntimeError) as error:
        _warn(f"llvmlite cannot be used ({error})")
        return None
    return llvm


@functools.cache
def _compile(kind: str, width: int, values: str, columns: str) -> Compiled:
    from llvmlite import ir

    from gap_hf.inference import gradients, kernels, teams

    llvm = _llvm()
    machine, features = _machine(llvm)
    module = ir.Module("gap_hf")
    tokens, along = 1, "groups"  # a gradient of the weight is of all tokens
    if kind == "blocks":
        tiles, tokens, along = (
            kernels.write_blocks(module, machine, width, values, columns),
            machine.tile(width),
            "either",
        )
    elif kind == "singles":
        tiles, tokens = kernels.write_singles(module, machine, values, columns), kernels.lanes_of(machine)[0]
        along = "either"
    elif kind == "block inputs":
        tiles, tokens = gradients.write_block_inputs(module, machine, width, columns), gradients.tokens_of(machine)
        along = "tokens"  # all groups add to them
    elif kind == "block gradients":
        tiles = gradients.write_block_gradients(module, machine, width, columns)
    else:
        tiles = gradients.write_single_gradients(module, machine, columns)
    share = teams.write_share(module, tiles, tokens, along)
    outside = {"share"}
    if openmp := _openmp(llvm):
        teams.write_team(module, share)
        outside.add("team")
    for function in module.functions:
        if not function.is_declaration and function.name not in outside:
            function.linkage = "internal"

    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    # The kernels say themselves what is a vector. Unrolled by LLVM, blocks are 1.1 to 1.3 times as fast.
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_interleaving = False
    passes = llvm.create_pass_builder(target, tuning)
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, target)
    engine.finalize_object()

    pointers, number = [ctypes.c_void_p] * 5, ctypes.c_int64
    part = ctypes.CFUNCTYPE(number, *pointers, number, number, number)
    whole = ctypes.CFUNCTYPE(number, *pointers, number, number)
    scratch = {
        "singles": lambda num_out, num_in: kernels.scratch_size(machine, num_in),
        "block inputs": lambda num_out, num_in: gradients.tokens_of(machine) * (num_out + num_in + kernels.SLICE),
    }
    return Compiled(
        share=part(engine.get_function_address("share")),
        team=whole(engine.get_function_address("team")) if openmp else None,
        scratch=scratch.get(kind, lambda num_out, num_in: 0),
        owner=engine,
    )


def _machine(llvm: Any) -> tuple[Any, str]:
    """The vector registers of this CPU, and its features as LLVM writes them."""
    from gap_hf.inference.kernels import Machine

    found = llvm.get_host_cpu_features()
    features = found.flatten()
    if found.get("avx512f") and found.get("avx512vl"):
        return Machine(lanes=16, registers=32), features + ",-prefer-256-bit"  # LLVM would use half of each register
    if found.get("avx2"):
        return Machine(lanes=8, registers=16), features
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    return Machine(lanes=4, registers=32 if is_arm else 16), features


def _openmp(llvm: Any) -> bool:
    """Whether the OpenMP that torch brought into this process can be called: libgomp's interface, which LLVM's has too."""
    try:
        process = ctypes.CDLL(None)
        addresses = {name: ctypes.cast(getattr(process, name), ctypes.c_void_p).value for name in _OPENMP}
    except (OSError, TypeError, AttributeError):
        return False
    for name, address in addresses.items():
        llvm.add_symbol(name, address)
    return True


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    _state["forked"] = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
