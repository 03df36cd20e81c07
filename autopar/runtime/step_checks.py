"""What a training loop may do that would give other numbers in silence: refused, or told in the log."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.errors import InputError
from autopar.runtime.given_models import GivenModel

log = logging.getLogger(__name__)


class StepChecks:
    """Checks what lies between the calls of a Trainer.

    `given`: the user's model, if other trainers may have been given parts of it. `frozen`: parameters stay trained or
    frozen as they were when the plan was compiled. `replaced`: gradients that no step has used are about to be
    replaced. `steps_itself`: the trainer takes the optimizer's step apart, so that a step of the optimizer alone would
    be another one.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, steps_itself: bool
    ) -> None:
        self._params, self._steps_itself = dict(params), steps_itself
        self._trained = [param.requires_grad for param in params.values()]
        self._unused, self._stepping = False, False
        self._compared: set[str] = set()
        self.given: GivenModel | None = None
        optimizer.register_step_pre_hook(self._before_step)

    def before_backward(self) -> None:
        """InputError where a parameter has been frozen or unfrozen; a warning where gradients are replaced unused.

        Before the first backward also one where another trainer has copies of the same parameters.
        """
        if self.given is not None:
            self.given.compare_once()
        for (name, param), trained in zip(self._params.items(), self._trained, strict=True):
            if param.requires_grad is not trained:
                raise InputError(
                    f"{name} was {'frozen' if trained else 'unfrozen'} after the plan was made: save, set "
                    "requires_grad_ on the model, parallelize it anew, and load"
                )
        if self._unused and any(param.grad is not None for param in self._params.values()):
            log.warning(
                "forward_backward replaces gradients that no step has used: gradients do not accumulate from call to "
                "call; give all rows of a step in one batch (global_batch=...), which the plan cuts into micro-batches"
            )

    def after_backward(self) -> None:
        """Gradients are there that no step has used."""
        self._unused = True

    def same_batch(self, batch: Mapping[str, Any] | Sequence[Any], method: str) -> None:
        """InputError on every rank where the first batch of a method of the Trainer is not the same on all of them."""
        if method in self._compared:
            return
        self._compared.add(method)
        items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        own = {str(name): _digest(value) for name, value in items if isinstance(value, Tensor)}
        found: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, own)
        for rank, other in enumerate(found):
            if wrong := [name for name in found[0] if other.get(name) != found[0][name]]:
                raise InputError(
                    f"rank {rank} was given another batch than rank 0 ({wrong[0]!r} differs): every rank gives the "
                    "whole global batch (no DistributedSampler; one seed for shuffling and augmentation)"
                )

    @contextmanager
    def own_step(self) -> Iterator[None]:
        """Around the trainer's step of the optimizer."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._unused = False
        if self._steps_itself and not self._stepping:
            raise InputError("call trainer.optimizer_step() in the place of optimizer.step(): under this plan "
                             f"{type(optimizer).__name__} steps parameter by parameter")


def _digest(value: Tensor) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and a checksum of the bytes."""
    own = value.detach().cpu().contiguous().reshape(-1)
    return tuple(value.shape), str(value.dtype), zlib.crc32(own.view(torch.uint8).numpy().data) if own.numel() else 0
