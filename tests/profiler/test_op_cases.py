"""Ops to measure: each distinct one once, as a rank runs it, and measured by the code that a GPU would run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from autopar.cluster.cluster import Cluster
from autopar.cluster.local import local_cluster
from autopar.cluster.measured import MeasuredOps, OpTensor
from autopar.cost_models.measured import OpTable
from autopar.graph.model_graph import ModelGraph, Op, Ref
from autopar.graph.source import capture_source, load_source
from autopar.profiler.clock import Work
from autopar.profiler.op_cases import OpCase, Operand, grid_cases, model_cases, plan_cases
from autopar.profiler.op_timing import _Maker, time_case, time_passes, time_runtime
from autopar.profiler.profile import sample_key
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.simulate.measured_share import measured_share

CPU = torch.device("cpu")


class StepClock:
    """A clock whose passes take 1, 2, 3, ... seconds on the device; it does the work, so that errors show.

    The host takes half a second, and half a second more in every third pass.
    """

    engine_s = 0.0

    def __init__(self, ends_s: float = 0.0) -> None:
        self.passes, self.ends_s = 0, ends_s

    def measure(self, prepare: Callable[[], Work]) -> tuple[float, float]:
        prepare()()
        self.passes += 1
        return float(self.passes), 1.0 if self.passes % 3 == 0 else 0.5


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    path = tmp_path_factory.mktemp("model") / "small.json"
    path.write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 32,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 16, "tie_word_embeddings": False,
    }))
    return capture_source(load_source(str(path), seq_len=16, dtype="float32"))


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return local_cluster(2, device="cpu")


def go_on(spent_s: float) -> bool:
    return False


def test_each_op_of_a_model_comes_once(graph: ModelGraph, cluster: Cluster) -> None:
    cases = model_cases(graph, cluster, "float32", rows=(2,), tensor_axes=())
    assert len({case.key for case in cases}) == len(cases)
    linears = {case.operands[1].tensor.shape for case in cases if case.target == "aten.linear.default"}
    assert linears == {(32, 32), (16, 32), (64, 32), (32, 64)}, "layers share their ops, and so do q and o"
    assert all(case.operands[0].tensor.shape[0] == 2 for case in cases if case.target == "aten.linear.default")
    assert any(case.operands[1].is_param for case in cases if case.target == "aten.linear.default")
    more = model_cases(graph, cluster, "float32", rows=(2, 4), tensor_axes=(2,))
    assert {case.key for case in cases} < {case.key for case in more}
    halves = {case.operands[1].tensor.shape for case in more if case.target == "aten.linear.default"}
    assert (32, 32) in halves
    assert {(16, 32), (32, 16)} <= halves, "on a tensor axis of 2 each rank has half of a product"


def test_a_plans_ops_are_told_exactly(graph: ModelGraph, cluster: Cluster) -> None:
    plan = plan_from_degrees(graph, cluster, Degrees(global_batch=4, seq_len=16, dtype="float32", tp=2, micro_batch=4))
    cases = plan_cases(graph, plan, cluster)
    samples = tuple(time_case(case, CPU, StepClock(), go_on) for case in cases)
    table = OpTable(MeasuredOps(samples=samples))
    node = replace(cluster.nodes[0], device=replace(cluster.device(0), measured=MeasuredOps(samples=samples)))
    share = measured_share(graph, replace(cluster, nodes=(node,)), plan)
    assert share is not None
    assert share.exact > 0.99
    assert share.exact + share.interpolated + share.modelled == pytest.approx(1.0)
    assert len(table.exact) == len(samples)
    assert measured_share(graph, cluster, plan) is None


def test_every_case_of_the_grid_runs() -> None:
    seen: set[str] = set()
    for case in grid_cases("float32", device_type="cpu"):
        if case.target in seen:
            continue
        seen.add(case.target)
        sample = time_case(case, CPU, StepClock(), go_on)
        assert sample.forward_s > 0
        assert sample.backward_s > 0, case.target
        assert sample_key(sample) == case.key
    assert len(seen) == 12


def test_passes_are_medians_after_a_warm_up() -> None:
    clock = StepClock()
    timed = time_passes(clock, lambda: lambda: None, 2, go_on)
    assert clock.passes == 4, "one warm-up and three that count"
    assert timed.device_s == 1.5, "the median of 2, 3 and 4 seconds over two instances"
    assert timed.host_s == 0.25
    assert timed.spread == pytest.approx(1 / 3)


def test_graphs_of_their_own_are_not_counted_where_a_step_has_none() -> None:
    cases = {case.target: case for case in grid_cases("float32", device_type="cpu")}
    count, ends_s = 3, 0.01  # the host's half second is that of all instances
    product = time_case(cases["aten.linear.default"], CPU, StepClock(), go_on)
    told = time_case(cases["aten.linear.default"], CPU, StepClock(ends_s), go_on)
    assert told.host_backward_s == product.host_backward_s, "a parameter's gradient leaves the graph in a step too"
    silu = time_case(cases["aten.silu.default"], CPU, StepClock(), go_on)
    told = time_case(cases["aten.silu.default"], CPU, StepClock(ends_s), go_on)
    assert silu.host_backward_s <= 0.5 / count
    assert told.host_backward_s == pytest.approx(silu.host_backward_s - ends_s)
    assert told.host_forward_s == silu.host_forward_s


def test_tensors_lie_in_memory_as_the_model_has_them() -> None:
    def operand(**changes: object) -> OpCase:
        given = Operand(tensor=OpTensor(shape=(2, 3, 4), dtype="float32", requires_grad=True), **changes)  # type: ignore[arg-type]
        op = Op(name="c", target="aten.clone.default", args=(Ref("x"),), outputs=("y",))
        return OpCase(op=op, target=op.target, settings="", dtype="float32", operands=(given,),
                      outputs=(given.tensor,))

    value, = _Maker(operand(order=(1, 0, 2)), CPU, None).tensors()
    assert value.stride() == (4, 8, 1)
    value, = _Maker(operand(order=(0, 1, 2), repeated=(1,)), CPU, None).tensors()
    assert value.stride() == (4, 0, 1)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "accumulate", "copy"])
def test_the_runtimes_own_work_runs(name: str) -> None:
    sample = time_runtime(name, "float32", 256, CPU, StepClock(), go_on)
    assert sample.target == f"autopar.{name}"
    assert sample.forward_s > 0


def test_an_op_that_does_not_run_is_told() -> None:
    bad = grid_cases("float32", device_type="cpu")[0]
    op = Op(name="b", target="aten.reshape.default", args=(Ref("x0"), (7, 7)), outputs=("y",))
    with pytest.raises((RuntimeError, ValueError)):
        time_case(replace(bad, op=op, operands=bad.operands[:1]), CPU, StepClock(), go_on)
