"""Gloo groups with one worker thread each: the one place that reaches for torch's ProcessGroupGloo.

torch 2.11 to 2.13 give a group two worker threads, and each writes the name of the collective that it has ended into
one std::string of the group, without a lock. When both write at once and a name is too long to lie inside the string
(ALLGATHER_COALESCED, as all-gathers and reduce-scatters are called there), the heap is corrupted: a rank dies later
with "malloc(): unaligned tcache chunk detected". One thread cannot race with itself. Collectives of a group run in
order all the same, and sends and receives use no worker.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

INTERFACES = "GLOO_SOCKET_IFNAME"  # as torch reads it: the interfaces to use, instead of the one of the host's name
_lock = threading.Lock()


@contextmanager
def one_worker_thread() -> Iterator[None]:
    """Inside, every gloo group that this process makes has one worker thread."""
    if not dist.is_gloo_available():
        yield
        return
    with _lock, patch.object(distributed_c10d, "ProcessGroupGloo", _one_worker(distributed_c10d.ProcessGroupGloo)):
        yield


def _one_worker(original: Any) -> type:
    """What stands in torch's module for its class: it makes the same groups, with one worker."""

    class Stand(type):
        def __call__(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
            options = original._Options()
            names = [name for name in os.environ.get(INTERFACES, "").split(",") if name]
            options._devices = [original.create_device(interface=name) for name in names] or [
                original.create_default_device()
            ]
            options._timeout, options._threads = timeout, 1
            return original(store, rank, size, options)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

        def __getattr__(cls, name: str) -> Any:
            return getattr(original, name)

    return Stand("ProcessGroupGloo", (), {})


def num_worker_threads(group: dist.ProcessGroup | None = None) -> int:
    """Worker threads of a gloo group, of the default one for None."""
    backend: Any = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    return int(backend.options._threads)
