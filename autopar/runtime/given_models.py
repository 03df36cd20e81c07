"""The models that the trainers of this process were given: each trains parameters of its own, copied from them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from weakref import WeakSet

import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

log = logging.getLogger(__name__)


class GivenModel:
    """The model that one trainer was given, for as long as that trainer lives. It keeps no parameter alive."""

    def __init__(self, model: nn.Module) -> None:
        self.name = type(model).__name__
        # By parameter of the user's: its name, and whether it is trained.
        self.params = WeakTensorKeyDictionary(
            {param: (name, param.requires_grad) for name, param in model.named_parameters()}
        )
        self._is_compared = False
        _live.add(self)

    def compare_once(self) -> None:
        """A warning where another trainer that lives has a copy of a parameter that it or this one trains.

        For the first step: by then a trainer whose place this one took is gone.
        """
        if self._is_compared:
            return
        self._is_compared = True
        if next(self._shared(), None) is None:
            return
        gc.collect()  # a trainer that nobody holds lives until then, as it is in cycles
        shared = list(self._shared())
        for _, other in shared:
            other._is_compared = True
        if shared and (not dist.is_initialized() or dist.get_rank() == 0):
            name, other = shared[0]
            more = f" and {len(shared) - 1} more parameters" if len(shared) > 1 else ""
            log.warning(
                "%s%s of %s are also in the model (%s) of another trainer that is not closed: each trains a copy of "
                "its own, and what one learns the other never sees: after its steps hand the trained weights over "
                "(other.module.load_state_dict of the parts of trainer.module.state_dict() that both have, or by name "
                "from full_state_dict()), or close() the trainer that is done", name, more, self.name, other.name,
            )

    def _shared(self) -> Iterator[tuple[str, GivenModel]]:
        """The parameters that another trainer has too, by name here, if either trains them; frozen ones stay alike."""
        for other in list(_live):
            if other is not self:
                for param, (name, is_trained) in self.params.items():  # type: ignore[no-untyped-call]
                    if param in other.params and (is_trained or other.params[param][1]):
                        yield name, other


_live: WeakSet[GivenModel] = WeakSet()
