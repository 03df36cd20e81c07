"""What was measured of a device and of its links, as values that a Cluster carries: op times and collective times.

Here is only what they are; `cost_models.measured` and `cost_models.measured_links` ask them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTensor:
    """A tensor of a measured op: its local shape, torch's word for its dtype, and whether a gradient flows to it."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSample:
    """Seconds of one op on tensors of these local shapes, forward and backward, as it runs in a training step.

    Medians over passes, of the slowest of the processes that timed it at once, on average over sweeps.
    `target` is the op's ("aten.linear.default") or one of the runtime's own ("autopar.adamw_step"). `settings` are
    those of its other arguments that change the work (a causal flag, a dim), as text. `dtype` is the compute dtype.
    Spreads are half the distance between the quartiles of the passes, as a share of the median. The `host` seconds are
    what the host takes to issue the op: on a CPU they are part of the time, elsewhere they pass beside it.
    """

    target: str
    settings: str
    dtype: str
    operands: tuple[OpTensor, ...]
    outputs: tuple[OpTensor, ...]
    is_copy: bool = False  # a view op that had to copy
    forward_s: float
    backward_s: float
    forward_spread: float = 0.0
    backward_spread: float = 0.0
    host_forward_s: float = 0.0
    host_backward_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpolationError:
    """How well a family of samples tells one of them from the others: leave-one-out, over `count` samples.

    `median_error` and `largest_error` are of |predicted / measured - 1| of forward and backward together.
    """

    family: str
    count: int
    median_error: float
    largest_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredOps:
    """Samples of one device, and how well each family of them interpolates."""

    samples: tuple[OpSample, ...]
    errors: tuple[InterpolationError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """From `from_bytes` on a message takes latency_s + size_bytes / bytes_per_s."""

    from_bytes: float
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveFit:
    """Seconds of one collective among `num_ranks` devices on `num_nodes` nodes by message size, in pieces.

    A new piece begins where the library changes its protocol. Sizes are those of the whole tensor (before scattering,
    after gathering), for send/receive the message's. `relative_error` is the root mean square of (fit - measured) /
    measured over `points`: (size_bytes, median seconds, of the slowest rank).
    """

    collective: str
    backend: str
    num_ranks: int
    num_nodes: int
    per_node: int
    groups_per_node: int  # as many such groups worked at once with a member on the same node
    pieces: tuple[Piece, ...]
    relative_error: float
    points: tuple[tuple[int, float], ...]

    def time_s(self, size_bytes: float) -> float:
        """Seconds of a message; `bytes_per_s` beyond the largest that was measured."""
        largest = self.points[-1][0] if self.points else size_bytes
        found = self.pieces[0]
        for piece in self.pieces[1:]:
            if size_bytes >= piece.from_bytes:
                found = piece
        within = min(size_bytes, largest)
        return found.latency_s + within / found.bytes_per_s + (size_bytes - within) / self.bytes_per_s

    @property
    def bytes_per_s(self) -> float:
        """The rate of large messages: the last piece's, or what the largest message reached where latency rules it.

        A line through messages that take no longer the larger they are says nothing of still larger ones.
        """
        last = self.pieces[-1]
        if not self.points:
            return last.bytes_per_s
        largest = self.points[-1][0]
        by_size_s = largest / last.bytes_per_s
        return last.bytes_per_s if by_size_s >= last.latency_s else largest / (last.latency_s + by_size_s)
