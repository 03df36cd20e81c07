"""A context axis is searched where sequences are long and rows are few, and any axis can be fixed by the user."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.cluster.parse import parse_cluster
from autopar.errors import InputError
from autopar.graph.model_graph import ModelGraph
from autopar.graph.source import capture_source, load_source
from autopar.plan.file import load_plan, save_plan
from autopar.plan.plan import Certificate
from autopar.plan.verify import problems, verify_plan
from autopar.search import context, planner
from autopar.search.best_first import Engine, Found, Outcome
from autopar.search.bounds import Bounds
from autopar.search.candidates import MESH_AXES, Candidate, PlanRequest, parse_mesh
from autopar.search.context import _added_alone, _Promising, _roughly, _without_axis, context_candidates
from autopar.search.planner import find_plan
from autopar.search.shardings import ShardingChooser
from autopar.sharding.state import Kind, shard
from autopar.simulate.simulator import simulate
from autopar.simulate.stage_cost import inner_axis

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 32000,
    "max_position_embeddings": 65536, "tie_word_embeddings": False,
}
SEQ_LEN = 65536


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return capture_source(load_source(str(folder), seq_len=SEQ_LEN, dtype="bfloat16"))


def request(**options: object) -> PlanRequest:
    return PlanRequest(**{"global_batch": 2, "seq_len": SEQ_LEN, **options})  # type: ignore[arg-type]


def test_a_context_axis_is_found_for_few_long_rows(graph: ModelGraph, tmp_path: Path) -> None:
    cluster = parse_cluster("2x8xH100-80GB")
    found = find_plan(graph, cluster, request())
    without = find_plan(graph, cluster, request(mesh=(("cp", 1),)))
    mesh = found.stages[0].mesh
    assert mesh.cp > 1
    assert found.certificate is not None and without.certificate is not None
    assert found.certificate.upper_bound_s < 0.95 * without.certificate.upper_bound_s
    assert found.certificate.lower_bound_s <= found.certificate.upper_bound_s
    assert "with a context axis" in found.certificate.searched
    context = {choice.cls: choice for choice in found.shardings if choice.axis == "cp"}
    layer = context[graph.blocks[1].cls]
    assert shard(1) in layer.inputs and layer.outputs == (shard(1),)
    assert not any(state.kind is Kind.SHARDED for choice in context.values() for state in choice.params)
    save_plan(found, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    verify_plan(again, graph, cluster)
    assert simulate(graph, cluster, again).step_time_s == pytest.approx(found.certificate.upper_bound_s)
    split = tuple(
        replace(choice, params=(shard(0),) * len(choice.params)) if choice is layer else choice
        for choice in found.shardings
    )
    assert any("cp axis splits a parameter" in text for text in problems(replace(found, shardings=split), graph))
    bare = tuple(
        replace(choice, ops=tuple((name, replace(own, lowering="")) for name, own in choice.ops))
        for choice in found.shardings
    )
    assert bare != found.shardings
    assert any("no rule splits aten.cross_entropy" in text for text in problems(replace(found, shardings=bare), graph))


@pytest.mark.parametrize("text", ["dp=4,tp=4", "pp=2,dp_shard=8", "cp=4,tp=2,dp=2"])
def test_fixed_axes_are_honoured(graph: ModelGraph, text: str) -> None:
    plan = find_plan(graph, parse_cluster("2x8xH100-80GB"), request(global_batch=8, mesh=parse_mesh(text)))
    for axis, size in parse_mesh(text):
        found = plan.num_stages if axis == "pp" else getattr(plan.stages[0].mesh, axis)
        assert found == size


@pytest.mark.parametrize(("text", "words"), [
    ("xp=2", "no axis 'xp'"), ("tp", "size ''"), ("tp=0", "size '0'"), ("tp=2,tp=4", "tp twice"),
])
def test_bad_meshes_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_mesh(text)


def test_a_mesh_that_no_plan_has(graph: ModelGraph) -> None:
    for mesh in ("tp=3", "dp=3,cp=5"):
        with pytest.raises(InputError, match=f"has the mesh {mesh}"):
            find_plan(graph, parse_cluster("2x8xH100-80GB"), request(mesh=parse_mesh(mesh)))
    assert "cp" in MESH_AXES


def test_rows_on_more_ranks_are_left_to_fewer_rows_on_fewer(graph: ModelGraph) -> None:
    """Micro-batches of d times the rows on d times the ranks have as many tokens on each, and more to exchange."""
    cluster, alone = parse_cluster("2x8xH100-80GB"), (("pp", 1), ("tp", 1))
    engine = Engine(graph, cluster, request(global_batch=8))
    number = len(graph.blocks)
    kept = context_candidates(cluster, engine.request, engine.chooser, number)
    every = context_candidates(cluster, request(global_batch=8, mesh=alone), engine.chooser, number)
    assert {c for c in kept if (c.pp, c.tp) == (1, 1)} < set(every)
    left_out = sorted(set(every) - set(kept))
    assert left_out
    for c in left_out:
        d = math.gcd(c.cp, c.micro_batch)
        fewer = replace(
            c, cp=c.cp // d, micro_batch=c.micro_batch // d, dp_replicate=c.dp_replicate * (d if c.zero == 0 else 1),
            dp_shard=c.dp_shard * (1 if c.zero == 0 else d),
        )
        assert fewer in kept or fewer.cp == 1
        own, other = (engine.simulate(each, (0, number)) for each in (c, fewer))
        assert own is None or (other is not None and other.step_time_s <= own.step_time_s), c


def test_pairs_of_axes_come_by_their_estimates_each_once(graph: ModelGraph) -> None:
    cluster = parse_cluster("2x8xH100-80GB")
    engine = Engine(graph, cluster, request())
    space = context_candidates(cluster, engine.request, engine.chooser, len(graph.blocks))
    plain = Bounds(graph, engine.layout, engine.request, engine.chooser.plain)
    promising, seen, estimates = _Promising(engine, plain, space), list[tuple[int, int]](), list[float]()
    while (found := promising.next_group(math.inf, None)) is not None:
        seen.append((found[0].cp, found[0].tp))
        estimates.append(promising.estimate_s)
        assert {(c.cp, c.tp) for c in found} == {seen[-1]}
    assert len(set(seen)) == len(seen) > 3
    assert estimates == sorted(estimates)
    first = [c for c in space if (c.cp, c.tp) == seen[0] and engine.chooser.choose(
        c.tp, sequence_parallel=c.sequence_parallel, cp=c.cp) is not None]
    best = engine.search(first).best
    assert best is not None and best.step_time_s == pytest.approx(estimates[0], rel=0.1), "an estimate tells the time"


@pytest.mark.parametrize(("in_orders_s", "looked_at"), [
    ((6.0, 7.0, 5.0), [2, 8]),  # slower in both ways than the first
    ((6.0, 5.5, 7.0), [2, 4]),
    ((math.inf, 7.0, 5.0), [2, 4, 8]),  # nothing to compare with
    ((6.0, math.inf, 7.0), [2, 4]),  # no order is told of the second: it is looked at
])
def test_axes_a_little_slower_are_looked_at_where_other_orders_promise_more(
    graph: ModelGraph, monkeypatch: pytest.MonkeyPatch, in_orders_s: tuple[float, ...], looked_at: list[int],
) -> None:
    groups = {cp: [Candidate(
        pp=2, tp=1, cp=cp, dp_replicate=1, dp_shard=1, zero=0, sequence_parallel=False, offload_optimizer=False,
        micro_batch=1, num_micro_batches=2,
    )] for cp in (2, 4, 8)}
    orders = dict(zip(groups, in_orders_s, strict=True))
    left = [(cp, space, 8.0 + 0.01 * at) for at, (cp, space) in enumerate(groups.items())]
    asked: list[int] = []

    class Told:
        """Estimates that are given: 8.0, 8.01 and 8.02 s in the usual order."""

        estimate_s = 0.0

        def __init__(self, *_: object) -> None: ...

        def next_group(self, limit: float, deadline: float | None) -> list[Candidate] | None:
            if not left or left[0][2] >= limit:
                return None
            _, space, self.estimate_s = left.pop(0)
            return space

        def in_other_orders_s(self, space: list[Candidate]) -> float:
            return orders[space[0].cp]

    def chosen(engine: object, plain: object, space: list[Candidate], limit: float) -> list[Candidate]:
        asked.append(space[0].cp)
        return space

    def search(self: Engine, space: list[Candidate], *, incumbent: Found, **_: object) -> Outcome:
        found = replace(incumbent, step_time_s=min(incumbent.step_time_s, 8.0), candidate=space[0])
        return Outcome(best=found if found < incumbent else incumbent, lower_bound_s=8.0, num_simulated=1,
                       complete=True)

    monkeypatch.setattr(context, "_Promising", Told)
    monkeypatch.setattr(context, "_with_shardings", chosen)
    monkeypatch.setattr(Engine, "search", search)
    cluster = parse_cluster("2x8xH100-80GB")
    engine = Engine(graph, cluster, request())
    first = Found(step_time_s=10.0, candidate=groups[2][0], cuts=(0, 1, 2), peak_bytes=(), limit_bytes=())
    context.search_context(engine, cluster, request(), first, None)
    assert asked == looked_at


def test_the_time_in_other_orders_is_the_least_of_what_can_have_one(graph: ModelGraph) -> None:
    cluster = parse_cluster("2x8xH100-80GB@100Gbps")
    engine = Engine(graph, cluster, request(global_batch=32))
    plain = Bounds(graph, engine.layout, request(global_batch=32), engine.chooser.plain)
    space = context_candidates(cluster, request(global_batch=32), engine.chooser, len(graph.blocks))
    promising = _Promising(engine, plain, space)
    told = {key: promising.in_other_orders_s(group) for key, group in promising.groups.items()}
    assert any(map(math.isfinite, told.values())) and any(map(math.isinf, told.values()))
    for key, group in promising.groups.items():
        cuts = [
            (cut[0] + promising._added_s(c)) for c in group if c.pp > 1 and c.zero < 3
            if engine.bounds.orders.known(_without_axis(c)) and engine.bounds.orders.keeps_all(_without_axis(c))
            if (cut := engine.bounds.orders.best_cut(_without_axis(c))) is not None
        ]
        assert told[key] >= min(cuts, default=math.inf)
        assert math.isinf(told[key]) == (not cuts)


def test_what_the_axis_adds_beside_a_tensor_axis_counts_the_network_that_its_groups_share(graph: ModelGraph) -> None:
    """Four groups of it leave each node beside four tensor ranks: what each of them sends is less, and as slow."""
    cluster, asked = parse_cluster("8x8xH100-80GB@200Gbps"), request()
    engine = Engine(graph, cluster, asked)
    chooser = ShardingChooser(graph, cluster, asked.dtype)
    plain = Bounds(graph, engine.layout, asked, chooser)
    c = Candidate(
        pp=1, tp=4, cp=16, dp_replicate=1, dp_shard=1, zero=0, sequence_parallel=True, offload_optimizer=False,
        micro_batch=2, num_micro_batches=1,
    )
    assert chooser.choose(1, sequence_parallel=False, cp=16) is not None
    added = _added_alone(engine, plain, c)
    assert plain.work.of_work(c) - plain.work.of_work(_without_axis(c)) == pytest.approx(added, rel=0.1)


def test_a_context_axis_is_weighed_as_one_after_a_tensor_axis_of_its_size(graph: ModelGraph) -> None:
    cluster = parse_cluster("2x8xH100-80GB")
    chooser, layer = ShardingChooser(graph, cluster, "bfloat16"), graph.block_class[graph.blocks[1].cls]
    outer = inner_axis(cluster, (0, 1))
    of_tensor, of_context = (chooser._costs_of_variant(layer, (2,), axes) for axes in ((), (outer,)))
    assert (of_tensor.tp, of_tensor.outer) == (2, ())
    assert (of_context.tp, of_context.outer) == (1, (outer,))


@pytest.fixture(scope="module")
def best(graph: ModelGraph) -> Certificate:
    """What the whole search proves."""
    certificate = find_plan(graph, parse_cluster("2x8xH100-80GB"), request()).certificate
    assert certificate is not None
    return certificate


@pytest.mark.parametrize(("name", "calls"), [
    ("_Promising", 0), ("estimated", 0), ("_with_shardings", 0), ("_with_shardings", 1), ("context_candidates", 0),
])
def test_an_interrupt_among_context_axes_leaves_a_bound_that_holds(
    graph: ModelGraph, best: Certificate, name: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, real, left = parse_cluster("2x8xH100-80GB"), getattr(context, name), iter(range(calls))
    interrupts = iter([KeyboardInterrupt])

    def interrupted(*args: object, **options: object) -> object:
        if next(left, None) is None and (error := next(interrupts, None)) is not None:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(context, name, interrupted)
    plan = find_plan(graph, machine, request())
    assert next(interrupts, None) is None, "it came"
    assert plan.certificate is not None
    assert plan.certificate.searched.endswith("an interrupt came first")
    assert 0 < plan.certificate.lower_bound_s <= best.upper_bound_s <= plan.certificate.upper_bound_s
    verify_plan(plan, graph, machine)


def test_a_time_limit_before_context_axes_proves_nothing_against_them(
    graph: ModelGraph, best: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All without one are settled by then, and the best of them is slower than the best with one."""
    machine, real = parse_cluster("2x8xH100-80GB"), planner.search_context

    def late(*args: object) -> object:
        *before, _, progress = args
        return real(*before, time.monotonic() - 1, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(planner, "search_context", late)
    certificate = find_plan(graph, machine, request(max_search_seconds=600)).certificate
    assert certificate is not None
    assert certificate.stopped_early
    assert 0 < certificate.lower_bound_s <= best.upper_bound_s < certificate.upper_bound_s


@pytest.mark.parametrize("text", ["2x8xH100-80GB", "4x4xA100-80GB@100Gbps"])
def test_rows_split_for_free_are_no_slower_than_a_context_axis(graph: ModelGraph, text: str) -> None:
    engine = Engine(graph, parse_cluster(text), request())
    space = context_candidates(engine.cluster, engine.request, engine.chooser, len(graph.blocks))
    chosen = [
        c for c in space
        if c.tp <= 2 and engine.chooser.choose(c.tp, sequence_parallel=c.sequence_parallel, cp=c.cp) is not None
    ]
    assert chosen
    for c in chosen:
        assert _roughly(engine, c) <= min(engine.bounds.work.of_work(c), engine.bounds.quick(c)) * (1 + 1e-9), c
