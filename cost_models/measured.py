"""Seconds of ops from measurements of the device: the same op at the same local shapes, else between measured sizes.

Between sizes: time = a + b * work, fitted to the nearest samples of the op's family (the same op with the same settings
and operands that carry gradients). Work is the number of multiplications of products and attention, the bytes of all
operands and results of everything else. The fit is used where leaving out each sample in turn and telling it from the
others gives a median error of at most `MAX_ERROR`, and where the op is near measured ones; else there is no answer, and
the efficiency curves of `compute` tell.

The runtime's own work (optimizer steps, passes over memory, layers of data parallelism) has one size, the number of its
elements, and is measured at every fourth power: it takes what lies on the line between the two sizes beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

import numpy as np

from autopar.cluster.cluster import DeviceType
from autopar.cluster.measured import InterpolationError, MeasuredOps, OpSample, OpTensor
from autopar.cost_models.compute import FREE, LocalTensor, OpTime
from autopar.cost_models.op_kinds import OpKind, base_name, op_kind
from autopar.graph.model_graph import DTYPE_BYTES, Arg, Op, Ref

MAX_ERROR = 0.25  # of a family's leave-one-out median: beyond it the efficiency curves are as good
MIN_SAMPLES = 4  # of a family: fewer cannot be checked
MAX_DISTANCE = 3.0  # in octaves, to the nearest sample, over all features together
NUM_NEAREST = 6
# Elements below which the runtime's own work takes what it takes for so many: all of it is the host's.
SMALLEST_PASS = 256
SMALLEST_UNIT = 4096
_INTEGERS = {"int64", "int32", "int16", "int8", "uint8", "bool"}

Key = tuple[object, ...]


class Source(StrEnum):
    """Where the time of an op comes from."""

    EXACT = "exact"  # this op was measured at these sizes
    INTERPOLATED = "interpolated"
    MODELLED = "modelled"  # the efficiency curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A measured time, what the host takes to issue the op, and how it was found."""

    time: OpTime
    host: OpTime
    source: Source


def settings_of(op: Op) -> str:
    """The arguments of an op that change its work, as text: none for views, whose shapes say it all.

    Other numbers than whole ones (an epsilon, a scale) do not; a dropout's probability does where it is zero.
    """
    name = base_name(op.target)
    if op_kind(op.target) in (OpKind.VIEW, OpKind.CREATION) or name in ("linears", "to", "_to_copy"):
        return ""
    args = [arg for arg in op.args if not (name in _NORMS and isinstance(arg, tuple))]
    named = [(key, arg) for key, arg in op.kwargs if not (name in _NORMS and isinstance(arg, tuple))]
    words = [*(_text(arg) for arg in args), *(f"{key}={_text(arg)}" for key, arg in named)]
    return ",".join(words).rstrip(",")


_NORMS = {"layer_norm", "native_layer_norm", "rms_norm"}


def _text(arg: Arg) -> str:
    if isinstance(arg, Ref):
        return "*"
    if isinstance(arg, tuple):
        return f"({' '.join(map(_text, arg))})"
    if arg is None:
        return ""
    if isinstance(arg, float):
        return "p" if arg else "0"
    return str(arg) if isinstance(arg, (bool, int, str)) else arg.value


def exact_key(
    target: str, settings: str, dtype: str, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor],
    is_copy: bool,
) -> Key:
    """What has to agree for a sample to be the op itself."""
    return (
        target, settings, dtype, is_copy, tuple(map(_tensor_key, operands)),
        tuple((item.shape, item.element_bytes) for item in outputs),
    )


def family_key(target: str, settings: str, dtype: str, operands: Sequence[LocalTensor], is_copy: bool) -> Key:
    """What has to agree for two samples to be compared by their sizes."""
    kinds = tuple((item.element_bytes, item.requires_grad, len(item.shape) > 0) for item in operands)
    return target, settings, dtype, is_copy, kinds


def _tensor_key(item: LocalTensor) -> Key:
    return item.shape, item.element_bytes, item.requires_grad


def local_tensor(item: OpTensor) -> LocalTensor:
    """A sample's tensor as the cost model describes one."""
    return LocalTensor(tuple(map(float, item.shape)), DTYPE_BYTES[item.dtype], item.requires_grad)


def features(
    target: str, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor]
) -> tuple[float, tuple[float, ...]]:
    """(work, features in octaves): what time grows with, and where an op lies among its family."""
    total_bytes = sum(item.size_bytes for item in (*operands, *outputs))
    last = operands[0].shape[-1] if operands and operands[0].shape else 1.0
    kind = op_kind(target)
    if kind is OpKind.ATTENTION and len(operands) >= 3:
        query, key = operands[0].shape, operands[1].shape
        batch = math.prod(query[:-2])
        work = batch * query[-2] * key[-2] * query[-1]
        return max(1.0, work), _octaves(batch, query[-2], key[-2], query[-1])
    if kind is OpKind.MATMUL and len(operands) >= 2 and outputs and operands[0].shape:
        first = operands[1] if base_name(target) in ("addmm", "baddbmm") else operands[0]
        k, n = first.shape[-1], outputs[0].shape[-1] if outputs[0].shape else 1.0
        rows = outputs[0].numel / max(1.0, n)
        return max(1.0, rows * n * k), _octaves(rows, n, k)
    if kind is OpKind.CONVOLUTION and len(operands) >= 2 and outputs:
        weight = operands[1]
        k, n = weight.numel / max(1.0, weight.shape[0]), weight.shape[0]
        rows = outputs[0].numel / max(1.0, n)
        return max(1.0, rows * n * k), _octaves(rows, n, k)
    return max(1.0, total_bytes), (*_octaves(total_bytes), 0.25 * _octaves(last)[0])


def _octaves(*sizes: float) -> tuple[float, ...]:
    return tuple(math.log2(max(1.0, size)) for size in sizes)


@dataclass(frozen=True, slots=True)
class _Point:
    work: float
    features: tuple[float, ...]
    sample: OpSample


class OpTable:
    """A device's samples, to be asked."""

    def __init__(self, measured: MeasuredOps) -> None:
        self.exact: dict[Key, OpSample] = {}
        self.families: dict[Key, list[_Point]] = {}
        self.host: dict[Key, OpTime] = {}  # of a family: sizes do not matter to the host
        for sample in measured.samples:
            operands, outputs = [local_tensor(t) for t in sample.operands], [local_tensor(t) for t in sample.outputs]
            head = (sample.target, sample.settings, sample.dtype)
            self.exact[exact_key(*head, operands, outputs, sample.is_copy)] = sample
            key = family_key(*head, operands, sample.is_copy)
            self.families.setdefault(key, []).append(_Point(*features(sample.target, operands, outputs), sample))
        for key, points in self.families.items():
            # What disturbs the host only adds: the least is the op's own.
            self.host[key] = OpTime(
                min(point.sample.host_forward_s for point in points),
                min(point.sample.host_backward_s for point in points),
            )
        self.trusted = {
            key for key, points in self.families.items()
            if len(points) >= MIN_SAMPLES and _leave_one_out(points)[0] <= MAX_ERROR
        }

    def find(
        self, op: Op, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor], dtype: str, *,
        is_copy: bool = False,
    ) -> Found | None:
        """The op's time on tensors of these local shapes; None where the measurements do not tell it."""
        return self.look_up(op.target, settings_of(op), operands, outputs, dtype, is_copy=is_copy)

    def look_up(
        self, target: str, settings: str, operands: Sequence[LocalTensor], outputs: Sequence[LocalTensor], dtype: str,
        *, is_copy: bool = False,
    ) -> Found | None:
        """`find`, for an op by its target and settings."""
        key = family_key(target, settings, dtype, operands, is_copy)
        sample = self.exact.get(exact_key(target, settings, dtype, operands, outputs, is_copy))
        if sample is not None:
            time = OpTime(sample.forward_s, sample.backward_s)
            return Found(time=time, host=self.host[key], source=Source.EXACT)
        if key not in self.trusted:
            return None
        between = _between(self.families[key], *features(target, operands, outputs))
        return None if between is None else Found(time=between, host=self.host[key], source=Source.INTERPOLATED)

    def own_work(self, target: str, settings: str, tensor: LocalTensor, dtype: str) -> OpTime | None:
        """The time of a piece of the runtime's own work on so many elements; None where too few sizes near it are."""
        points = self.families.get(family_key(target, settings, dtype, [tensor], is_copy=False), ())
        return _on_the_line(points, *features(target, [tensor], [])) if len(points) >= MIN_SAMPLES else None


_tables: dict[int, tuple[MeasuredOps, OpTable]] = {}


def op_table(device: DeviceType) -> OpTable | None:
    """The table of what was measured of a device; None where nothing was."""
    measured = device.measured
    if measured is None:
        return None
    found = _tables.get(id(measured))
    if found is None:
        if len(_tables) >= 64:
            _tables.clear()
        found = _tables[id(measured)] = measured, OpTable(measured)  # kept with its id, which is not used again
    return found[1]


def measured_pass_s(device: DeviceType, name: str, numel: float, dtype: str) -> float | None:
    """Seconds of a piece of the runtime's own work ("accumulate", "copy", "adamw", ...) on so many elements.

    None where it was not measured.
    """
    table = op_table(device)
    if table is None or numel <= 0:
        return 0.0 if table is not None else None
    tensor = LocalTensor((max(float(numel), SMALLEST_PASS),), DTYPE_BYTES[dtype], False)
    found = table.own_work(f"autopar.{name}", "", tensor, dtype)
    return None if found is None else found.forward_s


def measured_unit_s(device: DeviceType, numel: float, num_ranks: int, *, sharded: bool) -> OpTime | None:
    """Seconds of gathering a layer of so many parameters over `num_ranks` ranks, and of reducing its gradients.

    All copies and the host's work are in it. None where it was not measured.
    """
    table = op_table(device)
    if table is None:
        return None
    if numel <= 0:
        return FREE
    tensor = LocalTensor((max(float(numel), SMALLEST_UNIT),), 4, False)
    name = f"autopar.unit_{'sharded' if sharded else 'replicated'}"
    return table.own_work(name, str(num_ranks), tensor, "float32")


def _on_the_line(points: Sequence[_Point], work: float, where: Sequence[float]) -> OpTime | None:
    """The time on the line between the sizes below and above; beyond the largest in proportion; None far from all."""
    if min(math.dist(point.features, where) for point in points) > MAX_DISTANCE:
        return None
    below = max((point for point in points if point.work <= work), key=lambda point: point.work, default=None)
    above = min((point for point in points if point.work >= work), key=lambda point: point.work, default=None)
    one = below or above
    assert one is not None
    if below is None or above is None:
        share = work / one.work if above is None else 1.0
        return OpTime(share * one.sample.forward_s, share * one.sample.backward_s)
    share = (work - below.work) / (above.work - below.work) if above.work > below.work else 0.0
    ends = (below.sample, 1 - share), (above.sample, share)
    return OpTime(
        sum(part * sample.forward_s for sample, part in ends), sum(part * sample.backward_s for sample, part in ends)
    )


def _between(points: Sequence[_Point], work: float, where: Sequence[float]) -> OpTime | None:
    """A time between those of the nearest samples; None where they are far."""
    distances = [math.dist(point.features, where) for point in points]
    order = sorted(range(len(points)), key=lambda i: (distances[i], i))[:NUM_NEAREST]
    if not order or distances[order[0]] > MAX_DISTANCE:
        return None
    near = [points[i] for i in order]
    weights = np.array([math.exp(-distances[i]) for i in order])
    sizes = np.array([point.work for point in near])
    forward, backward = (
        _fitted(sizes, np.array([getattr(point.sample, name) for point in near]), weights, work)
        for name in ("forward_s", "backward_s")
    )
    return OpTime(forward, backward)


def _fitted(
    work: np.ndarray[tuple[int], np.dtype[np.float64]], seconds: np.ndarray[tuple[int], np.dtype[np.float64]],
    weights: np.ndarray[tuple[int], np.dtype[np.float64]], wanted: float,
) -> float:
    """a + b * wanted, by least squares of weighted relative errors with a, b >= 0."""
    if not np.all(seconds > 0):
        return float(np.average(seconds, weights=weights))
    scale = weights / seconds
    if len(work) > 1 and np.ptp(work) > 1e-6 * work[0]:
        rows = np.stack([np.ones_like(work), work], axis=1) * scale[:, None]
        constant, slope = (float(value) for value in np.linalg.lstsq(rows, weights, rcond=None)[0])
        if constant >= 0 and slope >= 0:
            return constant + slope * wanted
        if slope < 0:
            return float(np.exp(np.average(np.log(seconds), weights=weights)))
    return float(wanted * np.exp(np.average(np.log(seconds / work), weights=weights)))


def interpolation_errors(samples: Sequence[OpSample]) -> tuple[InterpolationError, ...]:
    """Leave-one-out errors of every family with enough samples near others, in the order of the families' names."""
    found = []
    for key, points in OpTable(MeasuredOps(samples=tuple(samples))).families.items():
        if len(points) >= MIN_SAMPLES:
            middle, largest = _leave_one_out(points)
            if math.isinf(middle):
                continue  # no sample is near another: they tell nothing of one another
            target, settings, dtype, *_ = key
            name = f"{target}({settings}) {dtype}"
            found.append(
                InterpolationError(family=name, count=len(points), median_error=middle, largest_error=largest)
            )
    return tuple(sorted(found, key=lambda item: (item.family, item.count, item.median_error)))


def _leave_one_out(points: Sequence[_Point]) -> tuple[float, float]:
    """Median and largest relative error of telling each sample from the others; infinite where none is near any."""
    errors = list(_errors(points))
    return (median(errors), max(errors)) if errors else (math.inf, math.inf)


def _errors(points: Sequence[_Point]) -> Iterator[float]:
    for i, point in enumerate(points):
        found = _between([*points[:i], *points[i + 1 :]], point.work, point.features)
        measured = point.sample.forward_s + point.sample.backward_s
        if found is not None and measured > 0:
            yield abs((found.forward_s + found.backward_s) / measured - 1)
