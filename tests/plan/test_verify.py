import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "search"))

from toy_graphs import cluster, mlp_chain

from autopar.errors import InputError, PlanMismatchError
from autopar.plan.plan import Mesh, Plan, Schedule
from autopar.plan.verify import verify_plan
from autopar.search.planner import Degrees, plan_from_degrees
from autopar.sharding.state import P, R, shard

GRAPH, MACHINE = mlp_chain(), cluster(2, 4)
PLAN = plan_from_degrees(GRAPH, MACHINE, Degrees(global_batch=16, tp=2, pp=2, dp_replicate=2, sequence_parallel=True))


def with_stage(index: int, **changes: object) -> Plan:
    stages = list(PLAN.stages)
    stages[index] = dataclasses.replace(stages[index], **changes)
    return dataclasses.replace(PLAN, stages=tuple(stages))


def with_sharding(**changes: object) -> Plan:
    first, *rest = PLAN.shardings
    return dataclasses.replace(PLAN, shardings=(dataclasses.replace(first, **changes), *rest))


def with_lowering(word: str) -> Plan:
    ops = PLAN.shardings[0].ops
    return with_sharding(ops=tuple((name, dataclasses.replace(strategy, lowering=word)) for name, strategy in ops))


def test_a_legal_plan_passes() -> None:
    verify_plan(PLAN, GRAPH, MACHINE)
    verify_plan(PLAN, GRAPH)
    verify_plan(PLAN, None)


@pytest.mark.parametrize(("plan", "message"), [
    (with_stage(0, last=2), "begins at block 3, and block 2 comes next"),
    (with_stage(1, first=4), "block 3 comes next"),
    (with_stage(1, last=5), "end at block 5, and the model has 6"),
    (with_stage(1, last=3), "holds no block"),
    (with_stage(1, devices=(4, 5, 6, 3)), "device 3 is used by stage 0 and by stage 1"),
    (with_stage(1, devices=(4, 5, 6, 8)), "uses device 8"),
    (dataclasses.replace(PLAN, num_devices=10**18), r"device 8 is in no stage \(999999999999999992 of"),
    (with_stage(1, devices=(5, 4, 6, 7)), "lists device 5 before 4 on its tp axis"),
    (with_stage(1, devices=(6, 7, 4, 5)), "lists device 6 before 4 on its dp_replicate axis"),
    (with_stage(1, mesh=Mesh(dp_replicate=2, tp=4)), "its mesh"),
    (with_stage(1, mesh=Mesh(dp_replicate=4)), "rows"),
    (with_stage(0, mesh=Mesh(dp_shard=2, tp=2)), "zero 0"),
    (with_stage(1, virtual=1), "chunk"),
    (dataclasses.replace(PLAN, num_micro_batches=7), "is 14 rows, and the global batch is 16"),
    (dataclasses.replace(PLAN, dtype="int4"), "dtype 'int4'"),
    (dataclasses.replace(PLAN, optimizer="lion"), "optimizer 'lion'"),
    (dataclasses.replace(PLAN, shardings=PLAN.shardings[1:]), "has no sharding"),
    (dataclasses.replace(PLAN, shardings=PLAN.shardings * 2), "2 shardings"),
    (dataclasses.replace(PLAN, blocks=("a",)), "block names"),
    (with_sharding(ops=()), "does not list the class's"),
    (with_sharding(params=()), "0 params"),
    (with_sharding(params=(shard(7),)), r"S\(7\) over 2 ranks"),
    (with_sharding(params=(P,)), "whole or split, never P"),
    (with_lowering("nonsense"), "no lowering 'nonsense'"),
    (with_sharding(outputs=(R,)), r"leaves prologue as R and enters layers.0 as S\(1\)"),
    (with_sharding(outputs=(shard(2),)), r"only R and S\(1\)"),
])
def test_each_broken_rule_is_named(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        verify_plan(plan, GRAPH, MACHINE)
    assert "\n" not in str(caught.value)


def test_interleaved_stages_share_their_group() -> None:
    plan = plan_from_degrees(GRAPH, MACHINE, Degrees(global_batch=16, pp=2, virtual_stages=2, dp_replicate=4))
    verify_plan(plan, GRAPH, MACHINE)
    with pytest.raises(InputError, match="chunk numbers, and the schedule is 1f1b"):
        verify_plan(dataclasses.replace(plan, schedule=Schedule.ONE_F_ONE_B), GRAPH, MACHINE)


def test_another_model_or_cluster_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match=r"made for model toy \(.*this model is toy"):
        verify_plan(PLAN, mlp_chain(num_layers=5), MACHINE)
    with pytest.raises(PlanMismatchError, match=r"made for cluster 2x4xTOY .* 1x8xTOY"):
        verify_plan(PLAN, GRAPH, cluster(1, 8))


def test_a_plans_own_action_lists() -> None:
    m = PLAN.num_micro_batches
    lists = tuple(
        ",".join([f"{stage}F{i}" for i in range(m)] + [f"{stage}B{i}" for i in range(m)]) for stage in range(2)
    )
    verify_plan(dataclasses.replace(PLAN, actions=lists), GRAPH, MACHINE)
    for wrong, message in (
        (lists[:1], "1 lists of actions for 2"), ((lists[0], lists[1].removesuffix(f",1B{m - 1}")), "needs F and B"),
        (lists[::-1], "list 1 runs stage 0"), (("0F0,nonsense", lists[1]), "no pipeline action"),
    ):
        with pytest.raises(InputError, match=message):
            verify_plan(dataclasses.replace(PLAN, actions=wrong), GRAPH, MACHINE)


def uneven(**changes: object) -> Plan:
    """Stage 0 as planned, with 4 rows for each data rank; stage 1 with 3 and 5, or as `changes` says."""
    plan = dataclasses.replace(PLAN, num_micro_batches=2, micro_batch=4)
    last = dataclasses.replace(plan.stages[1], **{"rows": (3, 5), **changes})
    return dataclasses.replace(plan, stages=(plan.stages[0], last))


def test_stages_may_share_out_rows_and_split_ops_each_in_its_own_way() -> None:
    verify_plan(uneven(), GRAPH, MACHINE)
    verify_plan(uneven(mesh=Mesh(dp_replicate=4), rows=(1, 1, 2, 4)), GRAPH, MACHINE)
    four = plan_from_degrees(GRAPH, MACHINE, Degrees(global_batch=16, micro_batch=4, tp=4, dp_replicate=2)).shardings
    verify_plan(uneven(mesh=Mesh(tp=4), rows=(8,), shardings=four), GRAPH, MACHINE)


@pytest.mark.parametrize(("plan", "message"), [
    (uneven(rows=(3, 4)), r"stage 1 takes 3 \+ 4 rows of each of 2 micro-batches, and the global batch is 16"),
    (uneven(rows=(8,)), r"stage 1 shares out rows \[8\], and it has 2 data ranks"),
    (uneven(rows=(8, 0)), "shares out rows"),
    (uneven(shardings=PLAN.shardings[:1]), "no sharding in the shardings of stage 1"),
    (uneven(shardings=PLAN.shardings * 2), "of stage 1 has 2 shardings for the tp axis"),
])
def test_what_a_stage_may_not_do_in_its_own_way(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify_plan(plan, GRAPH, MACHINE)
