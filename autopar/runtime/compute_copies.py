"""Whole parameters in the compute dtype, made from those at rest for each step: mixed precision without FSDP2.

Where no rank shares out a stage's states there is nothing to gather, and FSDP2's hooks would cost the host more than
the layers do. A block's copies lie in one buffer, which is filled by one kernel at the block's first forward of the
step, and freed when its gradients are whole. Gradients come in the compute dtype and are added to the parameters' own
in theirs, a block at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Accumulated = Callable[[nn.Parameter], None]


class CopyUnit:
    """The copies of some parameters, used and freed together. `leaves` are what the program computes with."""

    def __init__(self, params: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.params, self.is_fresh = tuple(params), False
        self.flat = torch.empty(sum(param.numel() for param in params), dtype=dtype, device=params[0].device)
        parts = torch.split(self.flat, [param.numel() for param in params])
        # `data` breaks the tie to the buffer's version, which changes with every step's fill.
        self.leaves = tuple(
            part.data.view(param.shape).requires_grad_(param.requires_grad)
            for part, param in zip(parts, params, strict=True)
        )
        self.trained = tuple(leaf for leaf in self.leaves if leaf.requires_grad)
        self._size_bytes = self.flat.untyped_storage().nbytes()
        self.free()

    @torch.no_grad()
    def refresh(self) -> None:
        """Fill the copies, if this step has not yet."""
        if not self.is_fresh:
            self.flat.untyped_storage().resize_(self._size_bytes)
            torch._foreach_copy_([leaf.data for leaf in self.leaves], [param.data for param in self.params])
            self.is_fresh = True

    def free(self) -> None:
        """Give the copies' memory back."""
        self.is_fresh = False
        self.flat.untyped_storage().resize_(0)

    @property
    def is_whole(self) -> bool:
        """Whether every gradient of this backward is there."""
        return all(leaf.grad is not None for leaf in self.trained)

    @torch.no_grad()
    def collect(self) -> list[nn.Parameter]:
        """Adds the leaves' gradients to the parameters'; those parameters."""
        found: list[nn.Parameter] = []
        first: tuple[list[Tensor], list[Tensor]] = [], []
        again: tuple[list[Tensor], list[Tensor]] = [], []
        for param, leaf in zip(self.params, self.leaves, strict=True):
            if leaf.grad is None:
                continue
            held = first if param.grad is None else again
            if param.grad is None:
                param.grad = torch.empty_like(param)
            held[0].append(param.grad)
            held[1].append(leaf.grad)
            leaf.grad = None
            found.append(param)
        if first[0]:
            torch._foreach_copy_(*first)
        if again[0]:
            torch._foreach_add_(*again)
        return found


class ComputeCopies:
    """The copies of one stage. `ends` says whether the backward that runs next is the stage's last of the step."""

    def __init__(
        self, params: Sequence[Sequence[nn.Parameter]], dtype: torch.dtype, accumulated: Accumulated | None
    ) -> None:
        """`params` are those of each block; of a parameter that several have, the first has the copy.

        `accumulated` is told of each parameter whose gradient is whole, or has grown by another micro-batch's.
        """
        self.ends, self._accumulated = False, accumulated
        self.unit_of: dict[nn.Parameter, CopyUnit] = {}
        self.units: list[CopyUnit] = []
        self.first_in: list[CopyUnit | None] = []  # for each block, the unit that it is the first to compute with
        for own in params:
            new = [param for param in dict.fromkeys(own) if self.is_copied(param, dtype) and param not in self.unit_of]
            unit = CopyUnit(new, dtype) if new else None
            self.first_in.append(unit)
            if unit is not None:
                self.units.append(unit)
                self.unit_of.update(dict.fromkeys(new, unit))

    @staticmethod
    def is_copied(param: nn.Parameter, dtype: torch.dtype) -> bool:
        """Whether the parameter rests in another dtype than it is computed with."""
        return param.is_floating_point() and param.dtype != dtype

    def leaf(self, param: nn.Parameter) -> Tensor:
        """What stands for the parameter in the program."""
        unit = self.unit_of[param]
        return next(leaf for own, leaf in zip(unit.params, unit.leaves, strict=True) if own is param)

    def trained(self) -> list[Tensor]:
        """The leaves that gather gradients."""
        return [leaf for unit in self.units for leaf in unit.trained]

    def mark(self, unit: CopyUnit, inputs: Iterable[Any]) -> None:
        """The block that comes first of those which compute with the unit is about to run on these inputs.

        Once the backward goes on to what made an input it is through with the block, whose gradients are collected.
        (Inputs that nothing made are leaves like the parameters, and come in no order: `collect` is for them.) One hook
        for a block: one for each parameter would cost the host a tenth of a small layer's step.
        """
        for value in inputs:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                value.register_hook(self._hook(unit))  # type: ignore[no-untyped-call]

    def collect(self, *, is_last: bool) -> None:
        """Add what gradients the leaves have to the parameters', after every backward.

        `is_last`: the step needs the copies no more.
        """
        for unit in self.units:
            self._collect(unit)
            if is_last:
                unit.free()

    def end(self) -> None:
        """The step is over: parameters may change."""
        self.collect(is_last=True)
        self.ends = False

    def _hook(self, unit: CopyUnit) -> Callable[[Tensor], None]:
        """What is called with an input's gradient. It holds neither: autograd's graph would keep them alive."""
        own, whole = weakref.ref(self), weakref.ref(unit)

        def reached(_: Tensor) -> None:
            copies, unit = own(), whole()
            if copies is not None and unit is not None and unit.is_whole:
                copies._collect(unit)
                if copies.ends:
                    unit.free()

        return reached

    def _collect(self, unit: CopyUnit) -> None:
        for param in unit.collect():
            if self._accumulated is not None:
                self._accumulated(param)
