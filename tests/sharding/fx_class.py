"""Turns an exported forward into one BlockClass, by itself, so that the rules' tests need no other room."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from autopar.graph.model_graph import Arg, BlockClass, Literal, Op, Ref, TensorInfo

_KINDS = {torch.dtype: "dtype", torch.device: "device", torch.layout: "layout", torch.memory_format: "memory_format"}


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch).loss


def info_of(name: str, value: torch.Tensor, requires_grad: bool) -> TensorInfo:
    return TensorInfo(
        name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."), requires_grad=requires_grad
    )


def _arg(value: Any, names: dict[torch.fx.Node, str]) -> Arg:
    if isinstance(value, torch.fx.Node):
        return Ref(names[value])
    if isinstance(value, (list, tuple)):
        return tuple(_arg(item, names) for item in value)
    for kind, word in _KINDS.items():
        if isinstance(value, kind):
            return Literal(word, str(value).removeprefix("torch."))
    return value


def export_class(model: nn.Module, batch: dict[str, torch.Tensor]) -> BlockClass:
    """The whole model with its loss as one class; parameters and buffers under their own names."""
    model.train()
    program = torch.export.export(_Loss(model), (), batch, strict=False)
    tensors: dict[str, TensorInfo] = {}
    ops: list[Op] = []
    groups: dict[str, list[str]] = {"inputs": [], "params": [], "buffers": [], "outputs": []}
    signature = program.graph_signature
    trained = set(signature.inputs_to_parameters)

    def visit(graph_module: torch.fx.GraphModule, names: dict[torch.fx.Node, str], grad: bool) -> list[str]:
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                if node in names:
                    continue
                names[node] = node.name
                kind = (
                    "params"
                    if node.name in trained
                    else "buffers"
                    if node.name in signature.inputs_to_buffers
                    else "inputs"
                )
                if isinstance(node.meta.get("val"), torch.Tensor):
                    groups[kind].append(node.name)
                    tensors[node.name] = info_of(node.name, node.meta["val"], kind == "params")
            elif node.op == "output":
                return [names[item] for item in node.args[0]]
            elif node.op == "call_function":
                visit_call(graph_module, node, names, grad)
        raise AssertionError("a graph without output")

    def visit_call(
        graph_module: torch.fx.GraphModule, node: torch.fx.Node, names: dict[torch.fx.Node, str], grad: bool
    ) -> None:
        if node.target is operator.getitem:
            return
        if "wrap_with_set_grad_enabled" in str(node.target):
            inner = getattr(graph_module, node.args[1].target)
            bound = [item for item in inner.graph.nodes if item.op == "placeholder"]
            results = visit(inner, {p: names[a] for p, a in zip(bound, node.args[2:], strict=True)}, node.args[0])
            for user in node.users:
                names[user] = results[user.args[1]]
            return
        if "_assert" in str(node.target):
            return
        args = tuple(_arg(item, names) for item in node.args)
        kwargs = tuple((key, _arg(item, names)) for key, item in node.kwargs.items())
        value = node.meta["val"]
        reads = Op(name="", target="", args=args, kwargs=kwargs, outputs=()).operands
        flows = grad and any(tensors[name].requires_grad for name in reads)
        outputs = []
        for index, item in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            name = node.name if item is value else f"{node.name}_out{index}"
            tensors[name] = info_of(name, item, flows and item.is_floating_point())
            outputs.append(name)
        names[node] = outputs[0]
        for user in node.users:
            if user.target is operator.getitem:
                names[user] = outputs[user.args[1]]
        ops.append(Op(name=node.name, target=str(node.target), args=args, kwargs=kwargs, outputs=tuple(outputs)))

    groups["outputs"] = visit(program.graph_module, {}, True)
    return BlockClass(
        name="whole", ops=tuple(ops), tensors=tuple(tensors.values()), **{key: tuple(v) for key, v in groups.items()}
    )
