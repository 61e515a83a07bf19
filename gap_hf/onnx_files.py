"""ONNX files of a model: written, compared with torch in ONNX Runtime, and quantised to int8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gap_hf.errors import GaPError, first_line, require
from gap_hf.onnx_graphs import Graph, graphs_of
from gap_hf.quiet import quiet

# Of logits, relative to their largest: both sum in fp32, in another order.
TOLERANCE = 1e-4


def write_onnx(model: Any, folder: Path) -> list[Graph]:
    """Write a graph to a file each, `NAME.onnx`, with masked weights as zeros.

    Args:
        model: A transformers model on the CPU; in eval mode afterwards.
        folder: Exists.

    Returns:
        The graphs.

    Raises:
        GaPError: if onnx or onnxscript is missing, the model is of another kind, or torch cannot trace it.
    """
    require("onnx", "onnxscript")
    try:
        graphs = graphs_of(model.eval())
    except GaPError:
        raise
    except Exception as error:  # whatever a model of another kind stumbles over
        raise GaPError(
            f"onnx: {type(model).__name__} has no graphs of the kinds that are known ({first_line(error)}); expected a model that "
            "encodes, classifies, or generates with keys and values"
        ) from error
    for graph in graphs:
        try:
            write_graph(graph, folder / f"{graph.name}.onnx")
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise GaPError(
                f"onnx: torch {torch.__version__} cannot export {type(model).__name__} ({graph.name}): {first_line(error)}"
            ) from None
    return graphs


def write_graph(graph: Graph, path: Path) -> None:
    """Trace one graph, in eval mode, and write it."""
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.module.eval(),
            graph.args,
            dynamo=True,
            dynamic_shapes=graph.axes,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
        assert program is not None
        program.save(path)


def compare_with_torch(graphs: Sequence[Graph], folder: Path) -> float:
    """The largest difference of ONNX Runtime's outputs to torch's, relative to the largest output.

    Each graph is run on its example and on the first row of it alone, a shape that it was not traced with.

    Raises:
        GaPError: if onnxruntime is missing, or the difference is above `TOLERANCE`.
    """
    require("onnxruntime")
    worst = 0.0
    for graph in graphs:
        session = open_session(folder / f"{graph.name}.onnx")
        for rows in (slice(None), slice(0, 1)):
            args = tuple([t[rows] for t in arg] if isinstance(arg, list) else arg[rows] for arg in graph.args)
            with torch.no_grad(), quiet():
                expected = _flat(graph.module(*args))
            feed = {n: t.numpy() for n, t in zip(graph.inputs, _flat(args), strict=True)}
            for name, ours, theirs in zip(graph.outputs, expected, session.run(None, feed), strict=True):
                difference = float(np.abs(ours.numpy() - theirs).max() / max(1e-9, float(ours.abs().max())))
                if not difference <= TOLERANCE:
                    raise GaPError(
                        f"onnx: {graph.name}.onnx gives '{name}' {difference:.1e} off torch's, expected {TOLERANCE:.0e} at most"
                    )
                worst = max(worst, difference)
    return worst


def write_int8(source: Path, target: Path) -> None:
    """Quantise a file's constant matrices to int8, and activations as they come (ONNX Runtime's dynamic quantisation)."""
    require("onnx", "onnxruntime")
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(source, target, weight_type=QuantType.QInt8)


def open_session(path: Path, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU, whose threads do not spin when it is idle, as others run between its calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in _flat(item)]
