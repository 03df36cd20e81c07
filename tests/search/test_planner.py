import dataclasses
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_graphs import cluster, mlp_chain

from autopar.errors import InfeasibleError, InputError
from autopar.graph.capture import capture
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan, Recompute, Schedule
from autopar.plan.verify import verify_plan
from autopar.search.best_first import Engine
from autopar.search.candidates import candidates
from autopar.search.planner import Degrees, PlanRequest, find_plan, plan_from_degrees
from autopar.simulate.simulator import simulate

SMALL = mlp_chain(num_layers=4, hidden=64, inner=256, seq_len=32)
MIDDLE = mlp_chain(num_layers=6, hidden=512, inner=2048, seq_len=128, vocab=4096)
TIED = mlp_chain(num_layers=3, hidden=256, inner=512, seq_len=64, tied=True)


@settings(max_examples=20)
@given(
    st.sampled_from([SMALL, MIDDLE, TIED]), st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 2), (2, 3), (3, 2)]),
    st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.3, 0.6)]), st.sampled_from([6, 12, 24]),
    st.sampled_from([16.0, 0.06, 0.03]),
)
def test_plans_are_legal_feasible_and_no_worse_than_their_baselines(
    graph: ModelGraph, shape: tuple[int, int], speeds: tuple[float, ...], batch: int, memory_gib: float
) -> None:
    machine = cluster(per_node=shape[1], speeds=speeds[: shape[0]], memory_gib=memory_gib)
    try:
        plan = find_plan(graph, machine, PlanRequest(global_batch=batch, seq_len=32))
    except InfeasibleError:
        return
    verify_plan(plan, graph, machine)
    timeline = simulate(graph, machine, plan)
    assert timeline.feasible
    certificate = plan.certificate
    assert certificate is not None
    assert certificate.upper_bound_s == timeline.step_time_s
    assert certificate.lower_bound_s <= certificate.upper_bound_s
    assert len({stage.mesh for stage in plan.stages}) == 1 or not machine.is_uniform
    for baseline in plan.baselines:
        assert baseline.step_time_s is None or certificate.upper_bound_s <= baseline.step_time_s
    num_ranks = sum(stage.virtual == 0 for stage in plan.stages)
    for index, stage in enumerate(plan.stages):
        assert stage.peak_memory_bytes == timeline.rank_peak_bytes[index % num_ranks]
        assert stage.memory_limit_bytes is not None
        assert stage.peak_memory_bytes <= stage.memory_limit_bytes


class TwoTowers(nn.Module):
    """Each row of one tower is held against every row of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = self.left(x) @ self.right(y).T
        return nn.functional.cross_entropy(scores, torch.arange(len(x), device=x.device))


def test_a_loss_that_couples_rows_is_planned_in_one_part() -> None:
    graph = capture(TwoTowers(), (torch.randn(4, 8), torch.randn(4, 8)), tag_rows=True).graph
    plan = find_plan(graph, cluster(), PlanRequest(global_batch=8))
    assert (plan.num_micro_batches, plan.micro_batch, plan.stages[0].mesh.dp) == (1, 8, 1)
    assert any("without data axes and micro-batches: the loss at test_planner" in note for note in plan.notes)
    assert {b.summary for b in plan.baselines if not b.feasible} == {"the loss needs the batch in one part"}
    with pytest.raises(InfeasibleError, match="in one part: the loss at test_planner"):
        find_plan(graph, cluster(), PlanRequest(global_batch=8, micro_batch=4))


def test_search_equals_trying_everything() -> None:
    """Every candidate under its best and its even cut, one by one; a plan may have a better order or unlike stages."""
    request = PlanRequest(global_batch=8)
    for graph, machine in ((SMALL, cluster(2, 2)), (MIDDLE, cluster(speeds=(1.0, 0.4), per_node=2))):
        engine = Engine(graph, machine, request)
        space = candidates(machine, request, engine.chooser, len(graph.blocks))
        outcome = Engine(graph, machine, request).search(space)
        times = []
        for c in space:
            best = engine.bounds.best_cut(c)
            if best is not None:
                found = [engine.simulate(c, cuts) for cuts in (best[1], engine.even_cuts(c.pp)) if cuts is not None]
                times += [item.step_time_s for item in found if item is not None]
        assert outcome.best is not None
        assert outcome.best.step_time_s == min(times)
        certificate = find_plan(graph, machine, request).certificate
        assert certificate is not None
        assert certificate.upper_bound_s <= min(times)


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 0.5)])
def test_where_cuts_are_few_the_best_of_all_is_proved(speeds: tuple[float, ...]) -> None:
    graph, machine, request = mlp_chain(num_layers=4, hidden=256), cluster(speeds=speeds), PlanRequest(global_batch=8)
    engine, last = Engine(graph, machine, request), len(graph.blocks)
    space = candidates(machine, request, engine.chooser, last)
    outcome = Engine(graph, machine, request).search(space)
    found = [
        engine.simulate(c, (0, *borders, last)) for c in space for borders in combinations(range(1, last), c.pp - 1)
    ]
    assert outcome.best == min(item for item in found if item is not None)
    assert outcome.lower_bound_s == outcome.best.step_time_s


def test_a_slow_device_gets_fewer_layers() -> None:
    graph = mlp_chain(num_layers=8, hidden=1024, inner=8192, seq_len=128)
    slow_network = dataclasses.replace(cluster().nodes[0].network, bandwidth_bytes_per_s=1e9)
    machine = cluster(per_node=1, speeds=(1.0, 0.34))
    machine = dataclasses.replace(
        machine, nodes=tuple(dataclasses.replace(node, network=slow_network) for node in machine.nodes)
    )
    plan = find_plan(graph, machine, PlanRequest(global_batch=32, micro_batch=1))
    assert [stage.last - stage.first for stage in plan.stages] == [7, 3]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from toy_graphs import cluster, mlp_chain
from autopar.plan.file import plan_to_json
from autopar.search.planner import PlanRequest, find_plan
plan = find_plan(mlp_chain(), cluster(speeds=(1.0, 0.5), per_node=2), PlanRequest(global_batch=8))
print("\\n".join(line for line in plan_to_json(plan).splitlines() if "search_seconds" not in line))
"""


def test_the_plan_does_not_depend_on_the_hash_seed() -> None:
    texts = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)], check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1]
    assert '"format"' in texts[0]


def test_time_limit_gives_the_best_so_far() -> None:
    plan = find_plan(MIDDLE, cluster(2, 4), PlanRequest(global_batch=24, max_search_seconds=0.3))
    assert plan.certificate is not None
    verify_plan(plan, MIDDLE, cluster(2, 4))


def test_progress_is_told() -> None:
    seen: list[tuple[int, int, float | None]] = []
    find_plan(SMALL, cluster(), PlanRequest(global_batch=8), progress=lambda *news: seen.append(news))
    assert seen[-1][0] == seen[-1][1]
    assert seen[-1][2] is not None


def test_infeasible_names_memory_and_devices() -> None:
    with pytest.raises(InfeasibleError) as caught:
        find_plan(MIDDLE, cluster(1, 2, memory_gib=0.05), PlanRequest(global_batch=1024))
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(r"needs at least 0\.\d+ GiB a device \(has 0\.05\)", text)
    assert "devices (" in text


def test_a_batch_that_nothing_divides_names_its_neighbours() -> None:
    graph = mlp_chain(num_layers=1)
    with pytest.raises(InfeasibleError, match="the nearest that do: 4 or 8"):
        find_plan(graph, cluster(8, 2), PlanRequest(global_batch=7))


def test_the_neighbours_of_a_batch_are_those_of_meshes_that_can_be() -> None:
    with pytest.raises(InfeasibleError, match=r"the nearest that do: 7$"):  # 7 tensor ranks would take it: none splits
        find_plan(mlp_chain(num_layers=1), cluster(1, 7), PlanRequest(global_batch=1))


def test_degrees_make_the_plan_they_say() -> None:
    plan = plan_from_degrees(SMALL, cluster(2, 4), Degrees(
        global_batch=32, tp=2, pp=2, dp_shard=2, zero=1, micro_batch=2, recompute=Recompute.FULL,
        sequence_parallel=True,
    ))
    verify_plan(plan, SMALL, cluster(2, 4))
    assert [(s.first, s.last, s.devices) for s in plan.stages] == [(0, 3, (0, 1, 2, 3)), (3, 6, (4, 5, 6, 7))]
    assert (plan.num_micro_batches, plan.sequence_parallel, plan.schedule) == (8, True, Schedule.ONE_F_ONE_B)
    assert simulate(SMALL, cluster(2, 4), plan).feasible


@pytest.mark.parametrize("degrees", [
    Degrees(global_batch=8, pp=2, virtual_stages=2, dp_replicate=2),
    Degrees(global_batch=8, pp=4, schedule=Schedule.GPIPE),
    Degrees(global_batch=8, pp=4, schedule=Schedule.ZERO_BUBBLE), Degrees(global_batch=8, cp=4),
    Degrees(global_batch=8, dp_replicate=2, dp_shard=2, zero=3, recompute=Recompute.SELECTIVE, compile=True),
], ids=["interleaved", "gpipe", "zb", "cp", "hsdp"])
def test_what_only_the_simulator_knows(degrees: Degrees) -> None:
    plan: Plan = plan_from_degrees(SMALL, cluster(1, 4), degrees)
    verify_plan(plan, SMALL, cluster(1, 4))
    assert simulate(SMALL, cluster(1, 4), plan).step_time_s > 0


@pytest.mark.parametrize(("degrees", "message"), [
    (Degrees(global_batch=8, tp=3), "multiply to 4"),
    (Degrees(global_batch=6, dp_replicate=4), "use 4 or 8"),
    (Degrees(global_batch=8, pp=4, virtual_stages=2), "choose at most 4"),
    (Degrees(global_batch=8, tp=0, dp_replicate=4), "at least 1"),
    (Degrees(global_batch=8, dp_replicate=4, ep=3), "ep 3"),
    (Degrees(global_batch=8, pp=2, dp_replicate=2, virtual_stages=2, schedule=Schedule.GPIPE), "interleaved"),
])
def test_degrees_that_do_not_fit_together(degrees: Degrees, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_from_degrees(SMALL, cluster(1, 4), degrees)


def test_what_is_not_searched_is_said() -> None:
    """A tensor axis that only repeats work can win on a tiny model, and no candidate has one."""
    certificate = find_plan(SMALL, cluster(), PlanRequest(global_batch=8)).certificate
    assert certificate is not None
    text = "; ".join(certificate.not_searched)
    assert "a tensor axis that repeats all work" in text
    assert "across nodes" in text
    assert "leaving devices unused" in text


class _Normalized(nn.Module):
    """Layers between which a norm takes the mean over the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(x).square().mean()
        return loss


def test_what_parts_of_the_batch_change_is_said_beside_the_plan() -> None:
    graph = capture(_Normalized(), {"x": torch.randn(8, 16)}, tag_rows=True).graph
    one = find_plan(graph, cluster(per_node=1, speeds=(1.0,)), PlanRequest(global_batch=8, seq_len=1, micro_batch=8))
    assert not [note for note in one.notes if "mixes rows" in note]
    parts = find_plan(graph, cluster(per_node=1, speeds=(1.0,)), PlanRequest(global_batch=8, seq_len=1, micro_batch=2))
    assert parts.num_micro_batches == 4
    assert [note for note in parts.notes if "mixes rows: it sees one micro-batch" in note]
