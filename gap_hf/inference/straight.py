"""A module's call as one straight line of torch operations, without the modules around them.

`torch.export` writes down which operations a call is made of. What is left between them is taken out here: modules, dropout,
checks, and the way through torch's dispatcher that a function of `torch` spares. A sparse layer stays a layer, called as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from gap_hf.inference.product import Layer, direct

_ATEN = torch.ops.aten
# What an operation is called from Python with less around it. Same arguments, same operation.
_DIRECT: dict[Any, Callable[..., Any]] = {
    _ATEN.add.Tensor: torch.add,
    _ATEN.addmm.default: torch.addmm,
    _ATEN.arange.default: torch.arange,
    _ATEN.cat.default: torch.cat,
    _ATEN.div.Tensor: torch.div,
    _ATEN.embedding.default: torch.embedding,
    _ATEN.gelu.default: F.gelu,
    _ATEN.layer_norm.default: torch.layer_norm,
    _ATEN.linear.default: F.linear,
    _ATEN.matmul.default: torch.matmul,
    _ATEN.mean.dim: torch.mean,
    _ATEN.mul.Tensor: torch.mul,
    _ATEN.neg.default: torch.neg,
    _ATEN.permute.default: torch.permute,
    _ATEN.pow.Tensor_Scalar: torch.pow,
    _ATEN.relu.default: torch.relu,
    _ATEN.reshape.default: torch.reshape,
    _ATEN.rsqrt.default: torch.rsqrt,
    _ATEN.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    _ATEN.silu.default: F.silu,
    _ATEN.softmax.int: torch.softmax,
    _ATEN.sub.Tensor: torch.sub,
    _ATEN.tanh.default: torch.tanh,
    _ATEN.transpose.int: torch.transpose,
    _ATEN.unsqueeze.default: torch.unsqueeze,
}
_METHODS: dict[Any, str] = {_ATEN.expand.default: "expand", _ATEN.view.default: "view"}
# Give what they are given, where no gradient is asked for and nothing is changed in place.
_NOTHING = (
    _ATEN.alias.default,
    _ATEN.detach.default,
    _ATEN.detach_.default,
    _ATEN.lift_fresh_copy.default,
)
_CHECKS = ("_assert_", "sym_constrain_range")
_Kept = dict[Node, Tensor]


def straighten(
    program: ExportedProgram, module: nn.Module, layers: Iterable[nn.Module]
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the program's tensors, flat and in order, that gives its outputs, flat too.

    Parameters and buffers are the module's own tensors, so that changes in place are seen.

    Args:
        program: Exported from `module` in eval mode.
        module: Whose names the program uses.
        layers: Linears and Conv1Ds that are to be called as modules.

    Raises:
        ValueError: if it changes tensors in place.
    """
    root, graph = program.graph_module, program.graph_module.graph
    _check_functional(graph)
    kept = _kept_tensors(program, module)
    _take_out_nothing(graph, kept)
    _call_layers(graph, kept, layers)
    for number, (node, tensor) in enumerate(kept.items()):
        if node.users:
            name = f"kept_{number}"
            setattr(root, name, tensor)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.create_node("get_attr", name))
        graph.erase_node(node)
    for node in graph.nodes:
        if node.target in _DIRECT:
            node.target = _DIRECT[node.target]
        elif node.target in _METHODS:
            node.op, node.target = "call_method", _METHODS[node.target]
    graph.eliminate_dead_code()
    graph.set_codegen(CodeGen())  # plain arguments, in place of trees
    line = GraphModule(root, graph)
    # A module looks for an attribute in four places, and the line has hundreds.
    own = {node.target: getattr(line, node.target) for node in graph.nodes if node.op == "get_attr"}
    return partial(type(line).forward, SimpleNamespace(**own))


def _kept_tensors(program: ExportedProgram, module: nn.Module) -> _Kept:
    """The inputs of the graph that are the module's, or constants that tracing met."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    kept: _Kept = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            kept[node] = own[names[node.name]]
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            constant: Any = program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            kept[node] = constant
    return kept


def _check_functional(graph: Graph) -> None:
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.target not in _NOTHING:
            raise ValueError(f"{node.target} changes a tensor in place")


def _take_out_nothing(graph: Graph, kept: _Kept) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        same: Any = None
        if node.target in _NOTHING or (node.target is _ATEN.dropout.default and node.args[2] is False):
            same = node.args[0]
        elif node.target is _ATEN.cat.default:
            # A cache begins with nothing, and what comes is joined to it.
            some = [part for part in node.args[0] if part not in kept or kept[part].numel()]
            same = some[0] if len(some) == 1 else None
        elif any(check in str(node.target) for check in _CHECKS):
            graph.erase_node(node)
            continue
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _call_layers(graph: Graph, kept: _Kept, layers: Iterable[nn.Module]) -> None:
    """Where a layer's dense product stands, the layer itself."""
    by_parameters = {_key(layer._parameters["weight"], layer._parameters["bias"]): layer for layer in layers}
    for node in list(graph.nodes):
        if node.target is _ATEN.linear.default:
            x, weight, bias = cast(Any, (*node.args, None)[:3])
        elif node.target is _ATEN.addmm.default:
            bias, x, weight = cast(Any, node.args[:3])
        else:
            continue
        layer = by_parameters.get(_key(kept.get(weight), kept.get(bias)))
        if layer is None:
            continue
        call = direct(cast(Layer, layer))
        call.__name__ = f"layer_{node.name}"  # in the code that torch.fx writes
        node.target, node.args, node.kwargs = call, (x,), {}


def _key(weight: Tensor | None, bias: Tensor | None) -> tuple[int, int]:
    return id(weight), id(bias)
