"""The optimizer's step with its state in host memory: unit after unit is fetched, stepped on the device, and put back.

On CUDA the state rests in pinned memory; fetching, stepping and putting back follow one another (nothing overlaps, as
the cost model counts it). On the CPU the same copies are made within one memory. Not tried on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autopar.errors import InputError
from autopar.runtime import host_memory
from autopar.runtime.data_parallel import local_tensor


class OffloadedState:
    """Steps an optimizer whose state of some parameters rests in host memory.

    State tensors keep their identity; between steps their memory on the device is given back, and reading them needs
    `on_device`. `units` are the parameters that are stepped at once. Hooks that a user registers on the optimizer's
    step run once a unit.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, units: Sequence[Sequence[nn.Parameter]]) -> None:
        if not _steps_parameters_one_by_one(optimizer):
            raise InputError(
                f"the plan offloads the optimizer's state, which needs an optimizer of torch.optim that steps each "
                f"parameter by itself, and {type(optimizer).__name__} is none: plan without offload"
            )
        self.optimizer = optimizer
        self.units = [list(unit) for unit in units]
        known = {id(param) for unit in units for param in unit}
        self.others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
        self._host: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by parameter: (state tensor, its host copy)

    def step(self) -> None:
        """One step of the optimizer."""
        every = [*self.others, *(param for unit in self.units for param in unit)]
        gradients = [(param, param.grad) for param in every]
        for param in every:
            param.grad = None
        gradient_of = {id(param): gradient for param, gradient in gradients}
        try:
            for unit in ([self.others] if self.others else []) + self.units:
                with self.on_device(unit):
                    for param in unit:
                        param.grad = gradient_of[id(param)]
                    self.optimizer.step()
                    for param in unit:
                        param.grad = None
        finally:
            for param, gradient in gradients:
                param.grad = gradient

    @contextmanager
    def on_device(self, params: Iterable[nn.Parameter]) -> Iterator[None]:
        """The state of these parameters is there meanwhile; what it is at the end goes to the host."""
        chosen = list(params)
        for param in chosen:
            for tensor, host in self._host.pop(id(param), ()):
                tensor.untyped_storage().resize_(host.numel() * host.element_size())
                tensor.copy_(host, non_blocking=True)
        try:
            yield
        finally:
            for param in chosen:
                self.send(param)

    def send(self, param: nn.Parameter) -> None:
        """Put the state of a parameter that is on the device into host memory."""
        if any(param is other for other in self.others):
            return
        kept = []
        for value in self.optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor) and value.dim() > 0 and (tensor := local_tensor(value)).numel():
                host = host_memory.empty_on_host(tensor.shape, tensor.dtype, pinned=tensor.is_cuda)
                host.copy_(tensor, non_blocking=True)
                kept.append((tensor, host))
        if any(tensor.is_cuda for tensor, _ in kept):
            torch.cuda.current_stream().synchronize()
        for tensor, _ in kept:
            tensor.untyped_storage().resize_(0)
        self._host[id(param)] = kept

    def host_bytes(self) -> int:
        """Bytes of state in host memory."""
        return sum(host.numel() * host.element_size() for kept in self._host.values() for _, host in kept)


def _steps_parameters_one_by_one(optimizer: torch.optim.Optimizer) -> bool:
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim") and kind.__name__ not in ("LBFGS", "SparseAdam")
