"""One op for the experts of a mixture: `autopar::experts`, with its backward and the text of its gate.

Sorting tokens by expert, products of changing sizes and putting them back are not a loop over dims that an axis could
split one op at a time; as one op they are: a loop over tokens, their choices, experts and the experts' inner dim.
What lies between the two products (a gated activation) differs by architecture: it is part of the op as a small
program, written as text (`gate_text`), so that the op stays a plain value of the graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from autopar.graph.grouped import grouped_product, grouped_weight_gradient

EXPERTS_OP = "autopar.experts.default"
# How the columns of the first product make up the inner dim: gates then ups, gate and up by turns, as they are.
HALVES, PAIRS, SINGLE = "halves", "pairs", "single"
Gate = Callable[[Tensor], Tensor]


# -- the gate ----------------------------------------------------------------------------------------------------------


def gate_text(gate: Gate, width: int, dtype: torch.dtype) -> str | None:
    """The ops of `gate`, which takes rows of `width` columns, as text; None where they are not a fixed list.

    That is a gate with parameters or random numbers, or one that does not treat each row by itself.
    """
    try:
        program = torch.export.export(_Gate(gate), (torch.zeros(3, width, dtype=dtype),), strict=False)
    except Exception:  # whatever the tracer raises: this gate is no fixed list of ops
        return None
    number: dict[str, int] = {}
    steps: list[Any] = []
    result = None
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            number[node.name] = len(number)
        elif node.op == "call_function":
            target = "getitem" if not isinstance(node.target, torch._ops.OpOverload) else str(node.target)
            if target.startswith("aten._assert"):
                continue
            random = target != "getitem" and torch.Tag.nondeterministic_seeded in node.target.tags
            if random or (target == "getitem" and getattr(node.target, "__name__", "") != "getitem"):
                return None
            steps.append([target, _encoded(node.args, number), _encoded(dict(node.kwargs), number)])
            number[node.name] = len(steps)
        elif node.op == "output":
            (result,) = node.args[0]
        else:
            return None
    placeholders = sum(node.op == "placeholder" for node in program.graph_module.graph.nodes)
    if placeholders != 1 or result is None:
        return None
    text = json.dumps({"steps": steps, "result": number[result.name]}, separators=(",", ":"))
    return text if _treats_rows_alone(gate_program(text), width) else None


class _Gate(torch.nn.Module):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._call = (gate,)  # in a tuple, so that a bound method's module is no submodule here

    def forward(self, rows: Tensor) -> Tensor:
        return self._call[0](rows)


def _encoded(value: Any, number: dict[str, int]) -> Any:
    if isinstance(value, torch.fx.Node):
        return {"value": number[value.name]}
    if isinstance(value, (list, tuple)):
        return [_encoded(item, number) for item in value]
    if isinstance(value, dict):
        return {"named": {key: _encoded(item, number) for key, item in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return None
    raise TypeError(f"a gate takes a {type(value).__name__}")


def _decoded(value: Any, values: list[Any]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, values) for item in value]
    if isinstance(value, dict):
        if "value" in value:
            return values[value["value"]]
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        return {key: _decoded(item, values) for key, item in value["named"].items()}
    return value


@lru_cache(maxsize=256)
def gate_program(text: str) -> Gate:
    """The function that a gate's text stands for."""
    told = json.loads(text)
    steps: list[tuple[Any, Any, Any]] = []
    for target, args, kwargs in told["steps"]:
        function: Any = _getitem
        if target != "getitem":
            namespace, name, overload = target.split(".")
            function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        steps.append((function, args, kwargs))

    def run(rows: Tensor) -> Tensor:
        values: list[Any] = [rows]
        for function, args, kwargs in steps:
            values.append(function(*_decoded(args, values), **_decoded(kwargs, values)))
        result: Tensor = values[told["result"]]
        return result

    return run


def _getitem(values: Any, index: int) -> Any:
    return values[index]


def _samples(width: int) -> Tensor:
    return 3 * torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _same(found: Callable[[], Tensor], wanted: Tensor) -> bool:
    try:
        value = found()
        return value.shape == wanted.shape and torch.allclose(value, wanted, rtol=1e-12, atol=1e-12)
    except (RuntimeError, IndexError):
        return False


def _treats_rows_alone(gate: Gate, width: int) -> bool:
    rows = _samples(width)
    try:
        whole = gate(rows)
    except (RuntimeError, IndexError):
        return False
    return whole.dim() == 2 and len(whole) == 4 and _same(lambda: gate(rows[1:2]), whole[1:2])


@lru_cache(maxsize=256)
def gate_layout(text: str, width: int) -> str:
    """HALVES, PAIRS or SINGLE where the gate treats each inner column by itself, laid out so; "" where it does not.

    Found by trying: the gate of some of the columns, against those columns of the gate of all.
    """
    gate, rows = gate_program(text), _samples(width)
    whole = gate(rows)
    inner = whole.shape[-1]
    if inner < 2:
        return ""
    for layout, each in ((SINGLE, 1), (HALVES, 2), (PAIRS, 2)):
        if inner * each != width:
            continue
        shape = {SINGLE: (4, inner), HALVES: (4, 2, inner), PAIRS: (4, inner, 2)}[layout]
        dim = 1 if layout == PAIRS else -1
        cuts = ((0, inner // 2), (inner // 2, inner - inner // 2))
        parts = [rows.reshape(shape).narrow(dim, start, length).flatten(1) for start, length in cuts]
        if all(
            _same(lambda part=part: gate(part), whole.narrow(1, start, length))  # type: ignore[misc]
            for part, (start, length) in zip(parts, cuts, strict=True)
        ):
            return layout
    return ""


# -- the op ------------------------------------------------------------------------------------------------------------


class _Routed:
    """The choices of all tokens, sorted by expert; those that name no expert here come last and are left out."""

    def __init__(self, index: Tensor, num_experts: int) -> None:
        ids = index.reshape(-1)
        ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
        order = torch.argsort(ids, stable=True)
        counts: list[int] = torch.bincount(ids, minlength=num_experts + 1).tolist()
        self.num_choices, self.num_tokens = index.shape[-1], index.shape[0]
        self.places = order[: sum(counts[:num_experts])]  # of the flattened choices
        self.tokens = self.places // self.num_choices
        self.experts = ids[self.places]
        self.spans: list[tuple[int, int, int]] = []
        start = 0
        for expert, count in enumerate(counts[:num_experts]):
            if count:
                self.spans.append((expert, start, start + count))
            start += count

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Each row with its expert's matrix of `weight` (experts, in, out), plus its expert's bias."""
        out = grouped_product(rows, weight, self.spans)
        return out if bias is None else out.add_(bias[self.experts])

    def weight_gradient(self, rows: Tensor, grads: Tensor, weight: Tensor) -> Tensor:
        return grouped_weight_gradient(rows, grads, weight, self.spans)

    def sum_by_expert(self, rows: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like).index_add_(0, self.experts, rows)

    def sum_by_token(self, rows: Tensor) -> Tensor:
        """(tokens, columns): the sum of each token's rows, in a fixed order."""
        spread = rows.new_zeros((self.num_tokens * self.num_choices, rows.shape[-1]))
        spread[self.places] = rows
        return spread.view(self.num_tokens, self.num_choices, rows.shape[-1]).sum(1)


def _matrices(weight: Tensor, transposed: bool) -> Tensor:
    """(experts, in, out) from what is stored."""
    return weight if transposed else weight.transpose(1, 2)


@torch.library.custom_op("autopar::experts", mutates_args=())
def experts(
    hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, transposed: bool, gate: str,
) -> tuple[Tensor, Tensor]:
    """The sum over a token's choices of weight * expert(token), and the first products, kept for the backward.

    Shapes, with t tokens, k choices, e experts, d columns, f inner columns and n of the first product: hidden (t, d),
    index and weights (t, k), up (e, n, d), down (e, d, f) or both `transposed`: (e, d, n), (e, f, d); biases (e, n) and
    (e, d); result (t, d). `gate` is `gate_text` of the function from n to f columns. A choice outside 0..e-1 adds zero.
    The second result has a row for every choice, sorted by expert; it is the backward's own.
    """
    routed = _Routed(index, up.shape[0])
    kept = hidden.new_empty((index.numel(), _matrices(up, transposed).shape[-1]))
    used = routed.product(hidden[routed.tokens], _matrices(up, transposed), up_bias)
    kept[: len(used)] = used
    kept[len(used) :] = 0
    rows = routed.product(gate_program(gate)(used), _matrices(down, transposed), down_bias)
    rows = rows * weights.reshape(-1)[routed.places].unsqueeze(-1)
    return routed.sum_by_token(rows).to(hidden.dtype), kept


@experts.register_fake
def _(
    hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, transposed: bool, gate: str,
) -> tuple[Tensor, Tensor]:
    columns = up.shape[2 if transposed else 1]
    return hidden.new_empty(hidden.shape), hidden.new_empty((index.shape[0] * index.shape[1], columns))


@torch.library.custom_op("autopar::experts_inner_backward", mutates_args=())
def experts_inner_backward(
    grad: Tensor, index: Tensor, weights: Tensor, down: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of each choice's inner columns, as `kept` is sorted, before and after its weight is applied."""
    routed = _Routed(index, down.shape[0])
    rows = routed.product(grad[routed.tokens], _matrices(down, transposed).transpose(1, 2), None)
    unweighted = grad.new_zeros((index.numel(), rows.shape[-1]))
    unweighted[: len(rows)] = rows
    weighted = torch.zeros_like(unweighted)
    weighted[: len(rows)] = rows * weights.reshape(-1)[routed.places].unsqueeze(-1)
    return unweighted, weighted


@experts_inner_backward.register_fake
def _(grad: Tensor, index: Tensor, weights: Tensor, down: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    shape = (index.shape[0] * index.shape[1], down.shape[1 if transposed else 2])
    return grad.new_empty(shape), grad.new_empty(shape)


@torch.library.custom_op("autopar::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, inner: Tensor, inner_grad: Tensor, first_grad: Tensor, transposed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of hidden, weights, up, down and the biases (empty where there are none).

    `inner` is the gate of `kept`, `inner_grad` its gradient before the weight is applied, `first_grad` that of `kept`.
    """
    routed = _Routed(index, up.shape[0])
    first, second = _matrices(up, transposed), _matrices(down, transposed)
    grads, count = grad[routed.tokens], len(routed.tokens)
    inner, inner_grad, first_grad = inner[:count], inner_grad[:count], first_grad[:count]
    # weight's gradient is <grads, row>, and the row is inner @ second + bias: no need to compute it again
    by_weight = (inner_grad * inner).sum(-1)
    if down_bias is not None:
        by_weight = by_weight + (grads * down_bias[routed.experts]).sum(-1)
    grad_weights = torch.zeros_like(weights).reshape(-1)
    grad_weights[routed.places] = by_weight.to(weights.dtype)
    grads = (grads * weights.reshape(-1)[routed.places].unsqueeze(-1)).to(hidden.dtype)
    grad_down = routed.weight_gradient(inner, grads, second)
    grad_up = routed.weight_gradient(hidden[routed.tokens], first_grad, first)
    return (
        routed.sum_by_token(routed.product(first_grad, first.transpose(1, 2), None)).to(hidden.dtype),
        grad_weights.view(weights.shape),
        grad_up if transposed else grad_up.transpose(1, 2),
        grad_down if transposed else grad_down.transpose(1, 2),
        hidden.new_empty(0) if up_bias is None else routed.sum_by_expert(first_grad, up_bias),
        hidden.new_empty(0) if down_bias is None else routed.sum_by_expert(grads, down_bias),
    )


@experts_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, inner: Tensor, inner_grad: Tensor, first_grad: Tensor, transposed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    up_grad, down_grad = (
        torch.empty_like(b) if b is not None else hidden.new_empty(0) for b in (up_bias, down_bias)
    )
    return (
        torch.empty_like(hidden), torch.empty_like(weights), torch.empty_like(up), torch.empty_like(down), up_grad,
        down_grad,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, index, weights, up, down, up_bias, down_bias, ctx.transposed, ctx.gate = inputs
    ctx.has_bias = up_bias is not None, down_bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, index, weights, up, down, up_bias, down_bias, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    hidden, index, weights, up, down, up_bias, down_bias, kept = ctx.saved_tensors
    inner_grad, weighted = torch.ops.autopar.experts_inner_backward(grad, index, weights, down, ctx.transposed)
    with torch.enable_grad():  # the gate is run again, to keep no more than its rows
        leaf = kept.detach().requires_grad_()
        inner = gate_program(ctx.gate)(leaf)
    (first_grad,) = torch.autograd.grad(inner, leaf, weighted.to(inner.dtype))
    found = torch.ops.autopar.experts_backward(
        grad, hidden, index, weights, up, down, up_bias, down_bias, inner.detach(), inner_grad, first_grad,
        ctx.transposed,
    )
    biases = [value if has else None for value, has in zip(found[4:], ctx.has_bias, strict=True)]
    return found[0], None, *found[1:4], *biases, None, None


experts.register_autograd(_backward, setup_context=_keep)
