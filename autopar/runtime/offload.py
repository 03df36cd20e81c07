"""Saved activations in host memory between forward and backward, layer by layer.

On CUDA the copies go through pinned memory on a stream of their own: a layer's tensors leave while the next layer
computes, and come back while the layer behind does its backward; at most two layers' tensors wait for their copies. On
the CPU a copy is a copy in the same memory: it saves nothing, and runs so that it can be tested. The overlap on CUDA
was written without a GPU at hand: what it hides of the copies is the cost model's assumption, not a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from autopar.runtime import host_memory

MIN_BYTES = 4096  # smaller storages stay where they are: a copy costs more than it frees


class _Copy:
    """One storage in host memory, as flat bytes."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.fetched: Tensor | None = None


class _Saved:
    """A saved tensor: a view of a storage that is in host memory."""

    def __init__(self, copy: _Copy, tensor: Tensor) -> None:
        self.copy, self.dtype = copy, tensor.dtype
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()


class _Layer:
    """What one forward of one layer keeps in host memory."""

    def __init__(self, owner: Offloader, held: Sequence[Tensor]) -> None:
        self.owner = owner
        self.held = {_key(tensor) for tensor in held}
        self.copies: WeakValueDictionary[int, _Copy] = WeakValueDictionary()  # they live with what autograd keeps
        self.sources: list[Tensor] = []  # kept until their copies have left
        self.left: Any = None
        self.arrived: Any = None
        self.is_fetched = False

    def pack(self, tensor: Tensor) -> Any:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        storage, key = tensor.untyped_storage(), _key(tensor)
        if tensor.device != self.owner.device or key in self.held or storage.nbytes() < MIN_BYTES:
            return tensor
        copy = self.copies.get(key)
        if copy is None:
            self.sources.append(tensor.detach())  # so that no other storage gets the key meanwhile
            copy = self.copies[key] = _Copy(self.to_host(_bytes_of(storage)))
            self.owner.kept.add(copy)
        return _Saved(copy, tensor)

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.fetch()
        if self.arrived is not None:
            torch.cuda.current_stream(self.owner.device).wait_event(self.arrived)
        flat = saved.copy.fetched
        assert flat is not None
        out = torch.empty(0, dtype=saved.dtype, device=flat.device)
        out.set_(flat.untyped_storage(), saved.offset, saved.size, saved.stride)
        return out

    def to_host(self, flat: Tensor) -> Tensor:
        stream = self.owner.stream
        host = host_memory.empty_on_host(flat.shape, flat.dtype, pinned=stream is not None)
        if stream is None:
            return host.copy_(flat)
        stream.wait_stream(torch.cuda.current_stream(self.owner.device))
        with torch.cuda.stream(stream):
            host.copy_(flat, non_blocking=True)
        return host

    def fetch(self) -> None:
        """Start to bring everything back."""
        if self.is_fetched:
            return
        self.is_fetched = True
        stream = self.owner.stream
        for copy in list(self.copies.values()):
            if stream is None:
                copy.fetched = copy.host.clone()
                continue
            flat = torch.empty(copy.host.shape, dtype=copy.host.dtype, device=self.owner.device)
            stream.wait_stream(torch.cuda.current_stream(self.owner.device))  # the memory may have been another's
            with torch.cuda.stream(stream):
                flat.copy_(copy.host, non_blocking=True)
            flat.record_stream(stream)
            copy.fetched = flat
        if stream is not None:
            self.arrived = stream.record_event()

    def end_forward(self) -> None:
        """All copies are under way; what they copy from is freed once they are done."""
        if self.owner.stream is None:
            self.sources.clear()
        else:
            self.left = self.owner.stream.record_event()

    def finish_leaving(self) -> None:
        """Let the compute wait for the copies that leave, and free what they copy from."""
        if self.left is not None:
            torch.cuda.current_stream(self.owner.device).wait_event(self.left)
            self.left = None
        self.sources.clear()


class Offloader:
    """Keeps the saved tensors of a stage's offloaded layers in host memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = _new_stream(device) if device.type == "cuda" else None
        self.kept: WeakSet[_Copy] = WeakSet()
        self._last: _Layer | None = None

    def host_bytes(self) -> int:
        """Bytes that are in host memory now."""
        return sum(copy.host.numel() for copy in self.kept)

    def begin(self) -> None:
        """A new micro-batch: no layer of the last one is fetched before its own backward."""
        if self._last is not None:
            self._last.finish_leaving()
        self._last = None

    def run(
        self, function: Callable[..., tuple[Any, ...]], inputs: Sequence[Any], held: Sequence[Tensor] | None
    ) -> tuple[Any, ...]:
        """A block's outputs. What autograd saves of it goes to host memory, but for `held`; None: all of it stays.

        When the block's backward begins, what the offloaded layer before it saved starts to come back.
        """
        before = self._last
        if held is None:
            outputs = function(*inputs)
        else:
            outputs = self._layer(function, inputs, held)
        differentiable = [out for out in outputs if isinstance(out, Tensor) and out.grad_fn is not None]
        if before is not None and differentiable:
            differentiable[0].register_hook(lambda _: before.fetch())  # type: ignore[no-untyped-call]
        return outputs

    def _layer(
        self, function: Callable[..., tuple[Any, ...]], inputs: Sequence[Any], held: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        layer = _Layer(self, held)
        with torch.autograd.graph.saved_tensors_hooks(layer.pack, layer.unpack):
            outputs = function(*inputs)
        layer.end_forward()
        if self._last is not None:
            self._last.finish_leaving()
        self._last = layer
        return outputs


def _new_stream(device: torch.device) -> Any:
    make: Callable[..., Any] = torch.cuda.Stream
    return make(device)


def _key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    flat.set_(storage)
    return flat
