"""The roofline: bounds, monotony, and what costs nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cost_models.compute import (
    CONVOLUTION_EFFICIENCY,
    FREE,
    MULTIPROCESSOR_RATES,
    LocalTensor,
    best_matmul_efficiency,
    kernel_time_s,
    matmul_efficiency,
    memory_bandwidth,
    op_time_s,
)
from autopar.cost_models.hardware import device_names, device_type
from autopar.cost_models.op_kinds import OpKind, base_name, element_bytes, op_kind
from autopar.graph.model_graph import BlockClass, Literal, Op, Ref, TensorInfo

H100 = device_type("H100-80GB")
dims = st.integers(1, 20000)


def tensor(*shape: float, size: int = 2, grad: bool = True) -> LocalTensor:
    return LocalTensor(tuple(shape), size, grad)


@given(dims, dims, dims, st.integers(1, 64))
def test_efficiency_is_a_share_of_the_best(m: int, n: int, k: int, batch: int) -> None:
    best = best_matmul_efficiency(H100, "bfloat16")
    assert 0 < matmul_efficiency(H100, m, n, k, batch) <= best <= 1
    assert matmul_efficiency(H100, m, n, k, batch) <= matmul_efficiency(H100, m, n, 2 * k, batch)


def test_a_large_product_reaches_what_is_measured() -> None:
    """H100: about 720 of 989 TFLOP/s on the shapes of a language model; A100: about 255 of 312."""
    assert 680e12 < H100.peak("bfloat16") * matmul_efficiency(H100, 8192, 8192, 8192) < 795e12
    a100 = device_type("A100-80GB")
    assert 235e12 < a100.peak("bfloat16") * matmul_efficiency(a100, 8192, 8192, 8192) < 268e12


@pytest.mark.parametrize("name", device_names())
def test_every_preset_has_an_efficiency(name: str) -> None:
    device = device_type(name)
    assert 0.4 < best_matmul_efficiency(device, "bfloat16") <= 1
    assert memory_bandwidth(device) <= device.memory_bandwidth_bytes_per_s


def test_views_and_dropout_that_is_off_are_free() -> None:
    x = tensor(4, 8, 16)
    view = Op(name="v", target="aten.view.default", args=(Ref("x"), (32, 16)), outputs=("y",))
    assert op_time_s(view, [x], [tensor(32, 16)], H100, "bfloat16", flops=0, backward_flops=0) == FREE
    off = Op(name="d", target="aten.dropout.default", args=(Ref("x"), 0.0, True), outputs=("y",))
    assert op_time_s(off, [x], [x], H100, "bfloat16", flops=0, backward_flops=0) == FREE
    on = Op(name="d", target="aten.dropout.default", args=(Ref("x"), 0.1, True), outputs=("y",))
    assert op_time_s(on, [x], [x], H100, "bfloat16", flops=0, backward_flops=0).forward_s > 0
    same = Op(name="t", target="aten.to.dtype", args=(Ref("x"), Literal("dtype", "bfloat16")), outputs=("y",))
    assert op_time_s(same, [x], [x], H100, "bfloat16", flops=0, backward_flops=0) == FREE


def test_small_kernels_take_a_launch() -> None:
    assert kernel_time_s(H100, 0.0) == H100.kernel_launch_s
    add = Op(name="a", target="aten.add.Tensor", args=(Ref("x"), Ref("y")), outputs=("z",))
    one = tensor(1)
    assert op_time_s(add, [one, one], [one], H100, "bfloat16", flops=0, backward_flops=0).forward_s == (
        H100.kernel_launch_s
    )


def test_memory_bound_and_compute_bound_products() -> None:
    linear = Op(name="l", target="aten.linear.default", args=(Ref("x"), Ref("w")), outputs=("y",))

    def time(rows: int) -> float:
        x, w, y = tensor(rows, 8192), tensor(8192, 8192), tensor(rows, 8192)
        flops = 2.0 * rows * 8192 * 8192
        return op_time_s(linear, [x, w], [y], H100, "bfloat16", flops=flops, backward_flops=2 * flops).forward_s

    weight_s = 2 * 8192 * 8192 / memory_bandwidth(H100)
    assert time(1) == pytest.approx(weight_s + 0.3 * H100.kernel_launch_s, rel=0.01)
    assert time(16384) == pytest.approx(2 * time(8192), rel=0.05)
    linear_grad = op_time_s(
        linear, [tensor(4096, 4096), tensor(4096, 4096, grad=False)], [tensor(4096, 4096)], H100, "bfloat16",
        flops=1e12, backward_flops=1e12,
    )
    assert linear_grad.backward_s == pytest.approx(linear_grad.forward_s)


def test_kinds() -> None:
    assert base_name("aten.add_.Tensor") == "add"
    assert op_kind("aten._softmax.default") is OpKind.REDUCTION
    assert op_kind("aten.linear.default") is OpKind.MATMUL
    assert op_kind("my.unheard_of.default") is OpKind.OTHER


def test_upcasts_of_a_float32_capture() -> None:
    """x -> float32 -> square -> back -> product, and a residual sum that names the upcast tensor."""
    names = ("x", "w", "up", "sq", "back", "out", "sum")
    f32 = Literal("dtype", "float32")
    cls = BlockClass(
        name="c", inputs=("x",), params=("w",), buffers=(), outputs=("sum",),
        ops=(
            Op(name="1", target="aten.to.dtype", args=(Ref("x"), f32), outputs=("up",)),
            Op(name="2", target="aten.pow.Tensor_Scalar", args=(Ref("up"), 2), outputs=("sq",)),
            Op(name="3", target="aten.to.dtype", args=(Ref("sq"), f32), outputs=("back",)),
            Op(name="4", target="aten.linear.default", args=(Ref("back"), Ref("w")), outputs=("out",)),
            Op(name="5", target="aten.add.Tensor", args=(Ref("up"), Ref("out")), outputs=("sum",)),
        ),
        tensors=tuple(TensorInfo(name=name, shape=(8, 8), dtype="float32", requires_grad=True) for name in names),
    )
    mixed = element_bytes(cls, "float32", "bfloat16")
    assert mixed == {"x": 2, "w": 2, "up": 4, "sq": 4, "back": 2, "out": 2, "sum": 2}
    assert set(element_bytes(cls, "float32", "float32").values()) == {4}


def test_kernels_along_rows_are_bound_by_the_multiprocessors() -> None:
    """Half the multiprocessors' rate where HBM would give more; twice the bytes a second in float32; HBM on a CPU."""
    forward, _ = MULTIPROCESSOR_RATES["softmax"]
    op = Op(name="s", target="aten.softmax.int", args=(Ref("x"), -1), outputs=("y",))
    x = tensor(8192, 8192)
    found = op_time_s(op, [x], [x], H100, "bfloat16", flops=0, backward_flops=0)
    assert found.forward_s == kernel_time_s(H100, 2 * x.size_bytes / (132 * forward))
    wide = tensor(8192, 8192, size=4)
    assert op_time_s(op, [wide], [wide], H100, "bfloat16", flops=0, backward_flops=0).forward_s == found.forward_s
    cpu = device_type("CPU")
    assert op_time_s(op, [x], [x], cpu, "bfloat16", flops=0, backward_flops=0).forward_s == kernel_time_s(
        cpu, 2 * x.size_bytes / memory_bandwidth(cpu))


def test_an_embeddings_gradient_is_filled_and_then_added_to() -> None:
    table, ids, out = tensor(50000, 1024), tensor(4096, size=8, grad=False), tensor(4096, 1024)
    op = Op(name="e", target="aten.embedding.default", args=(Ref("t"), Ref("i")), outputs=("y",))
    found = op_time_s(op, [table, ids], [out], H100, "bfloat16", flops=0, backward_flops=0)
    added_s = 3 * out.size_bytes / (132 * MULTIPROCESSOR_RATES["embedding"][1])
    assert found.backward_s == kernel_time_s(H100, added_s) + table.size_bytes / memory_bandwidth(H100)


def test_a_product_of_two_gradients_reads_the_result_twice() -> None:
    x, fixed = tensor(4096, 4096), tensor(4096, 4096, grad=False)
    op = Op(name="m", target="aten.mul.Tensor", args=(Ref("x"), Ref("y")), outputs=("z",))
    both = op_time_s(op, [x, x], [x], H100, "bfloat16", flops=0, backward_flops=0, saved_bytes=2 * x.size_bytes)
    one = op_time_s(op, [x, fixed], [x], H100, "bfloat16", flops=0, backward_flops=0, saved_bytes=x.size_bytes)
    assert both.backward_s == kernel_time_s(H100, 6 * x.size_bytes / memory_bandwidth(H100))
    assert one.backward_s == kernel_time_s(H100, 3 * x.size_bytes / memory_bandwidth(H100))


def test_a_convolution_turns_its_tensors_over() -> None:
    """4 images of 16 x 16 and 64 channels: each kernel moves so little that launches are what it takes: 4 and 8."""
    op = Op(name="c", target="aten.conv2d.default", args=(Ref("x"), Ref("w"), Ref("b")), outputs=("y",))
    tensors = tensor(4, 64, 16, 16), tensor(64, 64, 3, 3), tensor(64)
    out = tensor(4, 64, 16, 16)
    flops = 2.0 * out.numel * 64 * 9
    time = op_time_s(op, tensors, (out,), H100, "bfloat16", flops=flops, backward_flops=2 * flops)
    launch, bias_s = H100.kernel_launch_s, H100.kernel_launch_s
    assert (time.forward_s, time.backward_s) == pytest.approx((4 * launch, 8 * launch + bias_s))
    wide = tuple(LocalTensor(one.shape, 4, True) for one in (*tensors, out))
    plain = op_time_s(op, wide[:3], wide[3:], H100, "float32", flops=flops, backward_flops=2 * flops)
    rate = H100.peak("float32") * matmul_efficiency(H100, 1024, 64, 576, 1, "float32") * CONVOLUTION_EFFICIENCY
    assert plain.forward_s == pytest.approx(kernel_time_s(H100, flops / rate))  # float32 is read as it lies


@pytest.mark.parametrize(("width", "rate"), [(1024, 12.1e9), (2048, (12.1e9 * 17.5e9) ** 0.5), (4096, 17.5e9)])
@pytest.mark.parametrize(("name", "multiprocessors", "clock"), [("H200", 132, 1.98), ("A100-80GB", 108, 1.41)])
def test_norms_of_narrow_rows_are_slower_and_follow_the_clock(
    name: str, multiprocessors: int, clock: float, width: int, rate: float
) -> None:
    device = device_type(name)
    op = Op(name="n", target="aten.layer_norm.default", args=(Ref("x"), (width,)), outputs=("y",))
    x = tensor(2**25 // width, width)
    time = op_time_s(op, (x,), (x,), device, "bfloat16", flops=0, backward_flops=0)
    whole = min(memory_bandwidth(device), rate * multiprocessors * clock / 1.98)
    assert time.forward_s == pytest.approx(kernel_time_s(device, 2 * x.size_bytes / whole))
