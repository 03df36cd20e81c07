"""Stages with meshes of their own on unlike nodes: legal, no slower than alike ones, and not under the bound."""

from __future__ import annotations

from dataclasses import replace

from toy_graphs import cluster, mlp_chain

from autopar.cluster.cluster import Cluster
from autopar.plan.verify import verify_plan
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.simulator import simulate

GRAPH = mlp_chain(num_layers=4, hidden=512, inner=2048, seq_len=64)


def unlike_nodes() -> Cluster:
    """A fast node of two devices and a slow one of one, over a slow network."""
    nodes = cluster(per_node=2, speeds=(1.0, 0.4)).nodes
    network = replace(nodes[0].network, bandwidth_bytes_per_s=2e9)
    return Cluster(name="unlike", nodes=(
        replace(nodes[0], network=network), replace(nodes[1], num_devices=1, network=network)
    ))


def test_stages_of_unlike_nodes_are_legal_and_no_slower() -> None:
    machine, request = unlike_nodes(), PlanRequest(global_batch=16)
    alike = find_plan(GRAPH, machine, request)
    plan = find_plan(GRAPH, machine, replace(request, unlike_stages=True))
    verify_plan(plan, GRAPH, machine)
    timeline = simulate(GRAPH, machine, plan)
    assert timeline.feasible
    assert plan.certificate is not None and alike.certificate is not None
    assert plan.certificate.upper_bound_s == timeline.step_time_s
    assert plan.certificate.lower_bound_s <= timeline.step_time_s <= alike.certificate.upper_bound_s
    assert sorted(rank for stage in plan.stages for rank in stage.devices) == [0, 1, 2]
    assert not any("different meshes" in words for words in plan.certificate.not_searched)
    assert any("different meshes" in words for words in alike.certificate.not_searched)


def test_nothing_changes_where_nodes_are_alike() -> None:
    request = PlanRequest(global_batch=8)
    found = find_plan(GRAPH, cluster(2, 1), replace(request, unlike_stages=True))
    assert found == find_plan(GRAPH, cluster(2, 1), request)
