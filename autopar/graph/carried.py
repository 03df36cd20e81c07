"""What a forward leaves on a model's modules for the next one to read: hidden states, memories, running means.

Each step of a plan begins with what the modules held when the model was captured. A table that is made once and is
always the same is no harm; what depends on a batch, on weights or on chance would be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import CaptureError
from autopar.graph.explain import explained
from autopar.graph.left_behind import LeftBehind, tensors_in


def check_carries_nothing(model: nn.Module, run: Callable[[], Tensor], batch: Iterable[Tensor]) -> None:
    """CaptureError where a forward leaves on the model what changes the loss of the next; see `carried_over`."""
    with explained(model):
        attribute = carried_over(model, run, batch)
    if attribute is not None:
        raise CaptureError(
            f"{type(model).__name__}: the forward reads what an earlier one left in the attribute '{attribute}', and "
            "each step would begin without it: keep it in a buffer (register_buffer) and write into that with copy_, "
            "where it has no row for each of the batch's, or do without it"
        )


def carried_over(model: nn.Module, run: Callable[[], Tensor], batch: Iterable[Tensor]) -> str | None:
    """The name of an attribute that a forward leaves and that changes the loss of the next; None if there is none.

    `run` is a forward of the model, on the tensors of `batch`, to its loss. The modules are as before afterwards.
    """
    with LeftBehind(model).removed():
        trained = [param for param in model.parameters() if param.requires_grad]
        there = [*model.buffers(), *(tensor for _, tensor in _held(model))]
        own = {_memory(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}
        first = _Dependence([("", tensor) for tensor in [*batch, *trained]], there)
        with first:
            run()
        left = [(name, tensor) for name, tensor in _held(model)
                if first.source_of(tensor) is not None and _memory(tensor)._cdata not in own]
        if not left:
            return None
        second = _Dependence(left)
        with second:
            loss = run()
        return second.source_of(loss)


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the modules' attributes that are neither parameters nor buffers, with their names."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            yield from ((f"{path}.{name}" if path else name, tensor) for tensor in tensors_in(name, value))


def _memory(tensor: Tensor) -> torch.UntypedStorage | Tensor:
    """What views of the tensor share with it; a sparse one, which has no storage, is that itself."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


class _Dependence(TorchDispatchMode):
    """What depends on `sources`, tensors with names: also by what is written into memory, and through views.

    With `there`, the tensors that the model holds, those of them that are written to are sources too, and so are
    random numbers.
    """

    supports_higher_order_operators = True

    def __init__(self, sources: Iterable[tuple[str, Tensor]], there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By the address of memory, which stays alive.
        self._found: dict[int, tuple[str, torch.UntypedStorage | Tensor]] = {}
        for name, tensor in sources:
            self._mark(tensor, name)
        self._there = {_memory(tensor)._cdata for tensor in there}

    def source_of(self, tensor: Tensor) -> str | None:
        """The name of a source that the tensor depends on, if there is one."""
        found = self._found.get(_memory(tensor)._cdata)
        return None if found is None else found[0]

    def _mark(self, tensor: Tensor, name: str) -> None:
        memory = _memory(tensor)
        self._found.setdefault(memory._cdata, (name, memory))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        op = func if isinstance(func, torch._ops.OpOverload) else None
        writes = op is not None and op._schema.is_mutable
        names = [name for tensor in given if (name := self.source_of(tensor)) is not None]
        if self._there and op is not None:
            written = writes and any(_memory(tensor)._cdata in self._there for tensor in given)
            names += [""] * (written or torch.Tag.nondeterministic_seeded in op.tags)
        if names:
            for tensor in [*made, *(given if writes else [])]:
                self._mark(tensor, names[0])
        return result
