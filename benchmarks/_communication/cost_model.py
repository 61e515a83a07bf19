"""What a step's communication and a mask change cost, as formulas: fitted on one and two processes, or from link speeds.

    all-reduce of B bytes among n:   t = c + w(n) * [ 2 (n - 1) l + b B 2 (n - 1) / n ]
    work of U units in every process: t = w(n) * u U

c is the call itself, l one message, b one byte, u one unit. w(n) = max(1, n / cores) is how many processes share a core:
loopback has no network, so sending is work of the same cores, and with more processes than cores all of it takes turns.
u is taken with every core busy (as many processes as cores), because they share caches and memory. On a cluster with a
core and a link for each process w is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def sharing(num_processes: int, num_cores: int) -> float:
    """How many processes share a core."""
    return max(1.0, num_processes / num_cores)


def on_the_wire(num_bytes: float, num_processes: int) -> float:
    """Bytes that each process sends in a ring all-reduce."""
    return num_bytes * 2 * (num_processes - 1) / num_processes


@dataclass(frozen=True)
class AllReduce:
    """Fitted constants of an all-reduce, in seconds: of a call, of a message, of a byte."""

    call: float
    message: float
    byte: float

    def seconds(self, num_bytes: float, num_processes: int, *, shared: float = 1.0) -> float:
        messages = 2 * (num_processes - 1) * self.message
        return self.call + shared * (messages + self.byte * on_the_wire(num_bytes, num_processes))


def fit_all_reduce(points: Mapping[int, Sequence[tuple[float, float]]], *, num_cores: int) -> AllReduce:
    """Fit on (bytes, seconds) of one and of two processes; least squares of relative errors, nothing below 0."""
    call = float(np.median([seconds for _, seconds in points[1]]))
    num_bytes, seconds = np.array(points[2]).T
    shared = sharing(2, num_cores)
    columns = shared * np.stack([np.full_like(num_bytes, 2.0), on_the_wire(num_bytes, 2)], axis=1)
    weights = 1 / seconds
    wanted = (seconds - call) * weights
    message, byte = np.linalg.lstsq(columns * weights[:, None], wanted, rcond=None)[0]
    if message < 0:
        alone = columns[:, 1] * weights
        message, byte = 0.0, float(alone @ wanted / (alone @ alone))
    return AllReduce(call, float(message), float(byte))


def fit_rate(seconds: Mapping[int, float], units: float, *, num_cores: int) -> float:
    """Seconds per unit of work with every core busy, from those of one and two processes at the same time."""
    busy = max(n for n in (1, 2) if n in seconds and n <= max(num_cores, 1))
    return seconds[busy] / units


# --- from link speeds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Assumed, not measured: nodes of eight GPUs.

    Attributes:
        inside, between: Bytes a second that each rank sends in an all-reduce, inside a node and across nodes.
        hop: Seconds of one message.
        memory: Bytes a second that packing moves through a GPU's memory.
        bucket: Bytes of a DDP bucket, dense.
    """

    node: int = 8
    inside: float = 300e9
    between: float = 40e9
    hop: float = 10e-6
    memory: float = 2e12
    bucket: float = 25 * 2**20

    def all_reduce(self, num_bytes: float, num_buckets: float, num_ranks: int) -> float:
        """Seconds: bytes as in a ring, messages as in a tree."""
        speed = self.inside if num_ranks <= self.node else self.between
        messages = 2 * math.ceil(math.log2(num_ranks))
        return num_buckets * messages * self.hop + on_the_wire(num_bytes, num_ranks) / speed


@dataclass(frozen=True)
class Size:
    """A model to put into the formulas. 4 bytes a gradient, as Trainer has them under bf16 autocast too."""

    name: str
    num_params: float
    prunable: float  # share of the parameters that may be masked
    gradient: int = 4


# Prunable shares are those of Llama 3.2 1B and Llama 2 7B and 70B: all but embeddings, output layer and norms.
SIZES = (Size("1 B", 1.24e9, 0.787), Size("7 B", 6.74e9, 0.961), Size("70 B", 69.0e9, 0.992))
RANKS = (8, 16, 64, 256, 1024)


def packing_bytes(density: float) -> float:
    """Bytes of GPU memory traffic for a 4-byte gradient that is packed and unpacked, in a tensor of this density.

    Memory moves in sectors of 8 entries: with random places a share 1 - (1 - d)^8 of them holds a live one. Gathering
    reads those, clearing writes all, scattering reads and writes those; the index is read as int32, widened, and read as
    int64; the packed entries are written and read.
    """
    touched = 1 - (1 - density) ** 8
    return 4 * touched + 4 + 8 * touched + density * (4 + 4 + 8 + 8 + 4 + 4)


@dataclass(frozen=True)
class StepCost:
    """Of one rank in one step: bytes sent, seconds of the all-reduces, seconds of packing."""

    sent: float
    seconds: float
    packing: float = 0.0


def step_cost(
    size: Size, num_ranks: int, *, sparsity: float, packed: float, cluster: Cluster | None = None
) -> StepCost:
    """Communication of a step, not overlapped.

    Args:
        packed: Share of the prunable set that is at the target, 1 - 1/kappa in a phase of C-GaP, 1 in its fine-tune, 0
            for dense DDP. The rest is dense and goes as it is.
    """
    cluster = cluster or Cluster()
    masked = size.num_params * size.prunable * packed
    num_bytes = size.gradient * (size.num_params - masked * sparsity)
    num_buckets = size.gradient * size.num_params / cluster.bucket
    return StepCost(
        on_the_wire(num_bytes, num_ranks),
        cluster.all_reduce(num_bytes, num_buckets, num_ranks),
        masked * packing_bytes(1 - sparsity) / cluster.memory if packed else 0.0,
    )
