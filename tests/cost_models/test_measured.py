"""Op times from samples: exact matches, what lies between sizes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.cluster import DeviceType
from autopar.cluster.local import local_cluster
from autopar.cluster.measured import MeasuredOps, OpSample, OpTensor
from autopar.cost_models.compute import LocalTensor
from autopar.cost_models.measured import (
    OpTable,
    Source,
    interpolation_errors,
    measured_pass_s,
    measured_unit_s,
    op_table,
    settings_of,
)
from autopar.graph.model_graph import Literal, Op, Ref

LINEAR = "aten.linear.default"


def linear(rows: int, columns: int, width: int, rate: float = 5e10, floor_s: float = 1e-5) -> OpSample:
    """A product that takes floor + work / rate, twice that in the backward."""
    time_s = floor_s + 2.0 * rows * columns * width / rate
    return OpSample(
        target=LINEAR, settings="*,*", dtype="float32", forward_s=time_s, backward_s=2 * time_s,
        operands=(OpTensor(shape=(rows, width), dtype="float32", requires_grad=True),
                  OpTensor(shape=(columns, width), dtype="float32", requires_grad=True)),
        outputs=(OpTensor(shape=(rows, columns), dtype="float32", requires_grad=True),),
    )


def tensors(*shapes: tuple[float, ...]) -> list[LocalTensor]:
    return [LocalTensor(tuple(map(float, shape)), 4, True) for shape in shapes]


def op(target: str = LINEAR, *args: object, **kwargs: object) -> Op:
    return Op(name="op", target=target, args=args or (Ref("x"), Ref("w")), kwargs=tuple(kwargs.items()), outputs=("y",))  # type: ignore[arg-type]


GRID = tuple(linear(m, n, k) for m in (128, 512, 2048) for n in (256, 1024) for k in (256, 1024))


def test_the_same_op_at_the_same_sizes_is_its_sample() -> None:
    found = OpTable(MeasuredOps(samples=GRID)).find(op(), tensors((512, 256), (1024, 256)), tensors((512, 1024)),
                                                   "float32")
    assert found is not None
    assert found.source is Source.EXACT
    assert found.time.forward_s == linear(512, 1024, 256).forward_s
    assert found.time.backward_s == linear(512, 1024, 256).backward_s


@given(st.integers(100, 3000), st.integers(200, 1500), st.integers(200, 1500))
def test_between_sizes_a_line_is_found_again(m: int, n: int, k: int) -> None:
    table = OpTable(MeasuredOps(samples=GRID))
    found = table.find(op(), tensors((m, k), (n, k)), tensors((m, n)), "float32")
    assert found is not None
    assert found.time.forward_s == pytest.approx(linear(m, n, k).forward_s, rel=1e-6)
    assert found.time.backward_s == pytest.approx(linear(m, n, k).backward_s, rel=1e-6)


def test_the_host_takes_the_least_of_a_family_at_every_size() -> None:
    disturbed = [replace(item, host_forward_s=(2 + i % 3) * 1e-5, host_backward_s=(5 - i % 2) * 1e-5)
                 for i, item in enumerate(GRID)]
    table = OpTable(MeasuredOps(samples=tuple(disturbed)))
    for m, n, k in ((2048, 1024, 1024), (700, 300, 400)):
        found = table.find(op(), tensors((m, k), (n, k)), tensors((m, n)), "float32")
        assert found is not None
        assert (found.host.forward_s, found.host.backward_s) == (2e-5, 4e-5)


def test_leave_one_out_is_exact_on_a_line_and_large_on_noise() -> None:
    line, = interpolation_errors(GRID)
    assert (line.count, line.family) == (12, "aten.linear.default(*,*) float32")
    assert line.largest_error < 1e-9
    noisy = [replace(item, forward_s=item.forward_s * (9.0 if i % 2 else 1.0)) for i, item in enumerate(GRID)]
    error, = interpolation_errors(noisy)
    assert error.median_error > 0.25
    assert OpTable(MeasuredOps(samples=tuple(noisy))).find(
        op(), tensors((300, 300), (300, 300)), tensors((300, 300)), "float32"
    ) is None, "a family that does not tell its own members tells nothing"


@pytest.mark.parametrize(("shapes", "dtype", "grad"), [
    (((128, 256), (65536, 256)), "float32", True),  # far from every sample
    (((512, 512), (512, 512)), "bfloat16", True),  # another compute dtype
    (((512, 512), (512, 512)), "float32", False),  # no gradient: another backward
])
def test_what_was_not_measured_is_not_told(shapes: tuple[tuple[int, int], ...], dtype: str, grad: bool) -> None:
    operands = [replace(item, requires_grad=grad) for item in tensors(*shapes)]
    out = tensors((shapes[0][0], shapes[1][0]))
    assert OpTable(MeasuredOps(samples=GRID)).find(op(), operands, out, dtype) is None


def test_few_samples_are_not_interpolated() -> None:
    table = OpTable(MeasuredOps(samples=GRID[:3]))
    assert table.find(op(), tensors((200, 256), (256, 256)), tensors((200, 256)), "float32") is None


def test_settings_are_what_changes_the_work() -> None:
    norm = Op(name="n", target="aten.layer_norm.default", args=(Ref("x"), (384,), Ref("w"), Ref("b"), 1e-5),
              outputs=("y",))
    assert settings_of(norm) == "*,*,*,p"
    attention = "aten.scaled_dot_product_attention.default"
    assert settings_of(op(attention, Ref("q"), Ref("k"), Ref("v"), None, 0.0, True)) == "*,*,*,,0,True"
    assert settings_of(op("aten.view.default", Ref("x"), (2, 3))) == ""
    assert settings_of(op("aten.sum.default", Ref("x"), dtype=Literal("dtype", "float32"))) == "*,dtype=float32"


def device(samples: tuple[OpSample, ...]) -> DeviceType:
    return replace(local_cluster(1, device="cpu").device(0), measured=MeasuredOps(samples=samples))


def runtime(target: str, settings: str = "", powers: range = range(4, 11)) -> tuple[OpSample, ...]:
    return tuple(
        OpSample(target=target, settings=settings, dtype="float32", outputs=(), forward_s=1e-5 + numel * 1e-9,
                 backward_s=2e-5 + numel * 1e-9, operands=(OpTensor(shape=(numel,), dtype="float32"),))
        for numel in (4**power for power in powers)
    )


def test_pieces_of_the_runtimes_work() -> None:
    own = device(runtime("autopar.adamw") + runtime("autopar.unit_sharded", "2"))
    assert measured_pass_s(own, "adamw", 50_000, "float32") == pytest.approx(6e-5)
    assert measured_pass_s(own, "adamw", 0, "float32") == 0
    assert measured_pass_s(own, "sgd", 50_000, "float32") is None
    assert measured_pass_s(own, "adamw", 1, "float32") == measured_pass_s(own, "adamw", 256, "float32")
    unit = measured_unit_s(own, 100_000, 2, sharded=True)
    assert unit is not None
    assert (unit.forward_s, unit.backward_s) == pytest.approx((1.1e-4, 1.2e-4))
    assert measured_unit_s(own, 100_000, 4, sharded=True) is None
    assert measured_unit_s(own, 100_000, 2, sharded=False) is None
    plain = replace(own, measured=None)
    assert op_table(plain) is None
    assert measured_pass_s(plain, "adamw", 5, "float32") is None


def test_the_runtimes_work_is_told_on_the_line_between_two_sizes() -> None:
    seconds = {4**power: 1e-9 * 4**power * (3 if power % 2 else 1) for power in range(4, 13)}
    samples = tuple(
        replace(sample, forward_s=seconds[sample.operands[0].shape[0]], backward_s=0.0)
        for sample in runtime("autopar.adamw", powers=range(4, 13))
    )
    assert interpolation_errors(samples)[0].median_error > 0.25, "the line through the nearest sizes is no use"
    own = device(samples)
    for numel, time_s in seconds.items():
        assert measured_pass_s(own, "adamw", numel, "float32") == pytest.approx(time_s)
    middle = (4**9 + 4**10) / 2
    assert measured_pass_s(own, "adamw", middle, "float32") == pytest.approx((seconds[4**9] + seconds[4**10]) / 2)
    assert measured_pass_s(own, "adamw", 2 * 4**12, "float32") == pytest.approx(2 * seconds[4**12])
    assert measured_pass_s(own, "adamw", 64 * 4**12, "float32") is None, "far from all that was measured"


def test_a_table_is_made_once() -> None:
    own = device(GRID)
    assert op_table(own) is op_table(own)
