"""Dry runs: which ranks fold, which communication cannot work, what a recorder counts; and programs of whole plans."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from runtime_models import llama as small_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from autopar.cluster.parse import parse_cluster
from autopar.graph.capture import Captured, capture
from autopar.plan.plan import Plan, Recompute, is_layer
from autopar.runtime.collectives import Axis
from autopar.runtime.dry_run import (
    MemoryRow,
    communication_problems,
    distinct_ranks,
    dry_run,
    memory_problems,
    run_rank,
)
from autopar.runtime.fake_job import Call, Kind, Recorder, accelerator_kernels, fake_job, fake_mode
from autopar.runtime.lowerings import special_program
from autopar.runtime.recompute import recompute
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.sharding.state import R, shard
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.block_cost import block_cost
from autopar.simulate.simulator import simulate


def reduce_(size: int, *ranks: int, op: str = "all_reduce") -> Call:
    return Call(op=op, group=str(ranks), ranks=ranks, size_bytes=size)


def send(peer: int, size: int = 8) -> Call:
    return Call(op="send", group="p2p", ranks=(0, 1), size_bytes=size, peer=peer, during="0F0")


def recv(peer: int, size: int = 8) -> Call:
    return Call(op="recv", group="p2p", ranks=(0, 1), size_bytes=size, peer=peer, during="1F0")


@pytest.mark.parametrize(("calls", "problem"), [
    ({0: [reduce_(8, 0, 1), send(1)], 1: [reduce_(8, 0, 1), recv(0)]}, None),
    ({0: [reduce_(8, 0, 1, 2)], 1: [reduce_(8, 0, 1, 2)]}, None),  # rank 2 does as another one
    ({0: [send(1), recv(1)], 1: [send(0), recv(0)]}, None),
    ({0: [reduce_(8, 0, 1)], 1: [reduce_(16, 0, 1)]}, "rank 0 comes to all_reduce of 8 bytes .* and rank 1 to .* 16"),
    ({0: [reduce_(8, 0, 1)], 1: [reduce_(8, 0, 1, op="all_gather")]}, "rank 1 to all_gather"),
    ({0: [reduce_(8, 0, 1)], 1: []}, "deadlock: rank 0 waits at all_reduce of 8 bytes over ranks 0, 1"),
    ({0: [reduce_(8, 0, 1), reduce_(8, 0, 1, 2)], 1: [reduce_(8, 0, 1, 2), reduce_(8, 0, 1)]}, "deadlock"),
    ({0: [recv(1), send(1)], 1: [recv(0), send(0)]}, "deadlock: rank 0 waits at recv .* rank 1 waits at recv"),
    ({0: [send(1)], 1: [recv(0, size=4)]}, "rank 1 expects a recv of 4 bytes .* gets 8"),
    ({0: [send(1)], 1: []}, "rank 1 never receives the send of 8 bytes"),
])
def test_communication(calls: dict[int, list[Call]], problem: str | None) -> None:
    found = communication_problems(calls)
    if problem is None:
        assert found == []
    else:
        import re

        assert len(found) == 1
        assert re.search(problem, found[0]), found


def test_more_memory_than_predicted() -> None:
    def row(found: float) -> MemoryRow:
        return MemoryRow(
            rank=3, stage=0, num_ranks=1, kind="peak", program_bytes=found * 2**20, predicted_bytes=100 * 2**20
        )

    assert memory_problems([row(113), row(20)]) == []
    (problem,) = memory_problems([row(115)])
    assert problem == "rank 3 holds 115.0 MiB at its peak, and 100.0 were predicted"


def test_a_recorder_counts_what_lives_and_what_is_saved() -> None:
    with fake_mode(), Recorder() as recorder:
        weight = torch.empty(1000, requires_grad=True)
        recorder.label(weight, Kind.PARAMETER)
        (weight.exp() + 1).sum().backward()
        assert recorder.live[Kind.PARAMETER] == 4000
        assert recorder.most[Kind.ACTIVATION] == 4000  # exp keeps its result
        assert recorder.live[Kind.ACTIVATION] == 0
        recorder.forget_peak()
        held = torch.empty(10)
        assert recorder.peak_bytes == 4000 + 4000 + 40  # and the gradient
        held.untyped_storage().resize_(0)
        assert sum(recorder.live.values()) == 8000


def test_dropout_on_a_part_draws_no_number_of_fake_tensors() -> None:
    with fake_mode():
        program = special_program("axis_random", torch.ops.aten.dropout.default, Axis(group_name="", size=2, rank=1))
        assert program(torch.ones(4, 3), 0.5, True).shape == (4, 3)


@pytest.mark.parametrize("again", [False, True])
def test_attention_with_dropout_keeps_no_scores(again: bool) -> None:
    length = 64
    scores_bytes = length * length * 4

    def attend(query: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.ops.aten.scaled_dot_product_attention.default(query, query, query, None, 0.1),)

    def peak() -> int:
        query = torch.zeros(1, 1, length, 4, requires_grad=True)
        with Recorder() as recorder:
            (out,) = recompute(attend, query) if again else attend(query)
            out.sum().backward()
        return recorder.peak_bytes

    with fake_mode():
        assert peak() > scores_bytes
        with accelerator_kernels():
            assert peak() < scores_bytes


@pytest.mark.parametrize("again", [False, True])
def test_attention_with_a_trained_mask_keeps_no_scores(again: bool) -> None:
    rows, heads, length = 8, 2, 64
    scores_bytes = rows * heads * length * length * 4

    def attend(query: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=bias),)

    def peak() -> int:
        query = torch.zeros(rows, heads, length, 4, requires_grad=True)
        bias = torch.zeros(1, heads, length, length, requires_grad=True)  # one for all rows
        with Recorder() as recorder:
            (out,) = recompute(attend, query, bias) if again else attend(query, bias)
            out.sum().backward()
            assert bias.grad is not None and bias.grad.shape == bias.shape
        return recorder.peak_bytes

    with fake_mode():
        assert peak() > 2.2 * scores_bytes
        with accelerator_kernels():
            assert peak() < 1.7 * scores_bytes  # the mask's gradient of every row


@pytest.mark.parametrize("again", [False, True])
def test_a_norm_keeps_its_input_and_a_number_a_row(again: bool) -> None:
    rows, width = 64, 256
    wide_bytes = rows * width * 4

    def normed(data: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.ops.aten.rms_norm.default(data, [width], weight, 1e-6),)

    def peak() -> int:
        data, weight = (torch.zeros(n, width, dtype=torch.bfloat16, requires_grad=True) for n in (rows, 1))
        with Recorder() as recorder:
            flat = weight.view(width)
            out = recompute(normed, data, flat) if again else normed(data, flat)
            out[0].sum().backward()
            assert data.grad is not None and data.grad.shape == data.shape and weight.grad is not None
        return recorder.peak_bytes

    with fake_mode():
        assert peak() > 4 * wide_bytes  # torch's steps: the input and what is divided, both in float32
        with accelerator_kernels():
            assert peak() < 2 * wide_bytes


def test_a_recorder_counts_this_ranks_part_of_a_distributed_tensor() -> None:
    with fake_job(0, 4):
        mesh = init_device_mesh("cpu", (4,))
        parts = distribute_tensor(torch.zeros(40, 10), mesh, [Shard(0)], src_data_rank=None)
        with Recorder() as recorder:
            kept = torch.zeros_like(parts)
            assert kept.shape == (40, 10)
            assert recorder.peak_bytes == 10 * 10 * 4


def test_a_fake_job_leaves_nothing_behind() -> None:
    with fake_job(3, 8):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 8)
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Captured]:
    with fake_mode():
        model, batch, _ = small_llama(tied=False)
    return model, capture(model, batch, tag_rows=True)


def planned(captured: Captured, num_devices: int, **degrees: object) -> tuple[Plan, object]:
    cluster = parse_cluster(f"{num_devices}xH100-80GB")
    plan = plan_from_degrees(captured.graph, cluster, Degrees(
        dtype="float32", param_dtype="float32", seq_len=captured.graph.sequence_length, **degrees,  # type: ignore[arg-type]
    ))
    return plan, simulate(captured.graph, cluster, plan)


def test_ranks_that_do_the_same_fold(llama: tuple[nn.Module, Captured]) -> None:
    plan, _ = planned(llama[1], 32, global_batch=16, pp=2, tp=2, dp_shard=8, zero=2, micro_batch=1)
    folded = distinct_ranks(plan)
    assert [ranks[0] for ranks in folded] == [0, 1, 16, 17]
    assert sorted(rank for ranks in folded for rank in ranks) == list(range(32))
    stage = dataclasses.replace(plan.stages[1], rows=(2, 1, 1, 1, 1, 1, 1, 0))
    unlike = dataclasses.replace(plan, stages=(plan.stages[0], stage))
    assert len(distinct_ranks(unlike)) == 32


def test_the_programs_of_a_plan(llama: tuple[nn.Module, Captured]) -> None:
    plan, timeline = planned(llama[1], 8, global_batch=8, pp=2, tp=2, dp_shard=2, zero=3, micro_batch=2)
    ran = dry_run(*llama, plan, timeline)  # type: ignore[arg-type]
    assert ran.problems == ()
    assert (ran.num_programs, ran.num_ranks, ran.num_messages) == (4, 8, 4 * 2)
    assert ran.num_collectives > 0
    rows = {(row.rank, row.kind): row for row in ran.memory}
    assert {row.num_ranks for row in ran.memory} == {2}
    for rank in (0, 4):
        optimizer = rows[rank, "optimizer"]
        assert optimizer.program_bytes == pytest.approx(optimizer.predicted_bytes, rel=0.02)


def test_recomputation_communicates_what_it_is_counted_to(llama: tuple[nn.Module, Captured]) -> None:
    """A layer sums twice over the tensor axis; the second sum's tensor is not needed again."""
    runs = {}
    for word in (Recompute.NONE, Recompute.FULL):
        plan, _ = planned(llama[1], 2, global_batch=4, tp=2, micro_batch=4, recompute=word)
        runs[word] = run_rank(*llama, plan, (0, 1)).calls
    more = len(runs[Recompute.FULL]) - len(runs[Recompute.NONE])
    (stage,), machine = plan.stages, parse_cluster("2xH100-80GB")
    layers = [block for block in llama[1].graph.blocks if is_layer(block.name)]
    again = sum_s = 0.0
    for block in layers:
        cost = block_cost(
            llama[1].graph, llama[1].graph.block_class[block.cls], plan.class_shardings(block.cls, stage), tp=2, rows=4,
            device=machine.device(0), tp_group=machine.group((0, 1)), dtype=plan.dtype,
        )
        again, sum_s = again + cost.recompute_tp_s, cost.forward_tp_comm_s / 2
    assert more == len(layers) == pytest.approx(again / sum_s)


class Embedded(nn.Module):
    """An embedding that is most of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(2**18, 256), nn.Linear(256, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens)).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("optimizer", "offload_optimizer"), [
    ("adamw", False), ("adam", False), ("sgd", False), ("adamw", True),
])
def test_on_an_accelerator_the_optimizer_steps_without_temporaries(optimizer: str, offload_optimizer: bool) -> None:
    """A step of the CPU's would hold two of the largest parameter's size beside its gradient."""
    with fake_mode():
        model, batch = Embedded(), {"tokens": torch.zeros(2, 4, dtype=torch.int64)}
    captured = capture(model, batch, tag_rows=True)
    plan, timeline = planned(
        captured, 1, global_batch=2, micro_batch=2, optimizer=optimizer, offload_optimizer=offload_optimizer
    )
    ran = dry_run(model, captured, plan, timeline)  # type: ignore[arg-type]
    assert ran.problems == ()
    (peak,) = [row for row in ran.memory if row.kind == "peak"]
    workspace_bytes = 2**25  # which a program on fake tensors does not take
    assert peak.program_bytes == pytest.approx(peak.predicted_bytes - workspace_bytes, rel=0.01)


def test_a_program_that_leaves_a_collective_out_is_found(
    llama: tuple[nn.Module, Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    from autopar.runtime import collectives
    from autopar.runtime import dry_run as module

    plan, timeline = planned(llama[1], 2, global_batch=2, tp=2, micro_batch=2)
    reduce = collectives.all_reduce
    monkeypatch.setattr(
        "autopar.runtime.collectives.all_reduce", lambda axis, x, op="sum": x if axis.rank else reduce(axis, x, op)
    )
    ran = module.dry_run(*llama, plan, timeline)  # type: ignore[arg-type]
    assert ran.problems
    assert "rank 0" in ran.problems[0]


def test_a_shared_parameter_that_is_wanted_in_unlike_states_is_counted_whole() -> None:
    with fake_mode():
        model, batch, _ = small_llama(tied=True)
    captured = capture(model, batch, tag_rows=True)
    plan, _ = planned(captured, 2, global_batch=4, tp=2, micro_batch=2)
    first, last = captured.graph.blocks[0], captured.graph.blocks[-1]
    (tied,) = set(first.params) & set(last.params)
    wanted = {first.cls: (first, shard(0)), last.cls: (last, R)}

    def stored(own: ClassSharding) -> ClassSharding:
        if own.cls not in wanted:
            return own
        block, state = wanted[own.cls]
        each = zip(block.params, own.params, strict=True)
        return dataclasses.replace(own, params=tuple(state if name == tied else other for name, other in each))

    other = dataclasses.replace(plan, shardings=tuple(map(stored, plan.shardings)))
    timeline = simulate(captured.graph, parse_cluster("2xH100-80GB"), other)
    ran = dry_run(model, captured, other, timeline)
    assert ran.problems == ()
    for row in ran.memory:
        if row.kind == "optimizer":
            assert row.program_bytes == pytest.approx(row.predicted_bytes, rel=0.02)
