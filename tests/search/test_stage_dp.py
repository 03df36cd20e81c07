"""find_stages against every division of 500 small problems, and on problems with known answers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from itertools import pairwise, product

import pytest
from stage_brute_force import best_by_brute_force, random_tables

from autopar.errors import InfeasibleError, InputError
from autopar.plan.goal import Goal
from autopar.search import tables as tables_module
from autopar.search.objective import Objective
from autopar.search.stage_dp import FoundStages, chosen_options, find_stages
from autopar.search.tables import LayerOption, LayerStrategy, Link, Pool, StageTables, unequal_shares

FREE = Link(latency_s=0.0, bandwidth_bytes_per_s=float("inf"))


def alone(pool: str, seconds: float, layers: int = 24, held: float = 1.0) -> LayerStrategy:
    """One device that takes so long a layer."""
    layer = (LayerOption(forward_s=seconds / 3, backward_s=2 * seconds / 3, held_bytes=held),)
    return LayerStrategy(
        name=f"one {pool}", devices=((pool, 1),), layers=(layer,) * layers, static_bytes=(1.0,) * layers
    )


def unlike_pair(**changes: object) -> StageTables:
    """24 equal layers on four single devices of speeds 2, 2, 1, 1."""
    tables = StageTables(
        pools=(
            Pool(name="fast", nodes=(1, 1), memory_bytes=1e3, price_per_hour=3.0),
            Pool(name="slow", nodes=(1, 1), memory_bytes=1e3, price_per_hour=1.0),
        ),
        strategies=(alone("fast", 1.0), alone("slow", 2.0)), num_micro_batches=32, boundary_bytes=(1.0,) * 23,
        network=FREE,
    )
    return replace(tables, **changes)


def check(tables: StageTables, found: FoundStages) -> None:
    """Each layer once, no empty stage, every device at most once, memory held, times those of the tables."""
    assert [s.first for s in found.stages] == [0, *(s.last for s in found.stages[:-1])]
    assert found.stages[-1].last == tables.num_layers
    assert all(s.first < s.last for s in found.stages)
    taken: dict[tuple[int, int], int] = {}
    for back, stage in enumerate(reversed(found.stages)):
        strategy = tables.strategies[stage.strategy]
        assert stage.in_flight == min(back + 1, tables.num_micro_batches)
        per_pool: dict[str, int] = {}
        for pool, node, count in stage.nodes:
            taken[pool, node] = taken.get((pool, node), 0) + count
            per_pool[tables.pools[pool].name] = per_pool.get(tables.pools[pool].name, 0) + count
        assert per_pool == dict(strategy.devices)
        parts = [(p, n, c) for p, n, c in stage.nodes if c < tables.pools[p].nodes[n]]
        assert len(parts) <= len(strategy.devices)
        options = chosen_options(tables, stage)
        static = sum(strategy.static_bytes[stage.first : stage.last])
        held = stage.in_flight * sum(o.held_bytes for o in options) + max(o.extra_bytes for o in options)
        for (name, _), share in zip(
            strategy.devices, strategy.held_shares or (1.0,) * len(strategy.devices), strict=True
        ):
            assert static + share * held <= tables.pools[tables.pool_index[name]].memory_bytes * (1 + 1e-9)
        assert stage.time_s == pytest.approx(sum(o.forward_s + o.backward_s for o in options))
    for (pool, node), count in taken.items():
        assert count <= tables.pools[pool].nodes[node]
    for pool, idle in enumerate(found.idle):
        used = sum(count for (own, _), count in taken.items() if own == pool)
        assert used + idle == tables.pools[pool].num_devices


@pytest.mark.parametrize("block", range(10))
def test_random_problems_equal_brute_force(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        tables = random_tables(seed)
        objective = Objective(goal=(Goal.TIME, Goal.TIME, Goal.COST)[seed % 3])
        expected = best_by_brute_force(tables, objective)
        if expected is None:
            with pytest.raises(InfeasibleError):
                find_stages(tables, objective=objective)
            continue
        found = find_stages(tables, objective=objective)
        check(tables, found)
        assert found.score[0] == pytest.approx(expected[0], rel=1e-9), seed
        assert found.complete and abs(found.gap) < 1e-9, seed


def test_layers_go_by_speed() -> None:
    found = find_stages(unlike_pair())
    assert sorted(stage.last - stage.first for stage in found.stages) == [4, 4, 8, 8]
    assert {stage.strategy: stage.last - stage.first for stage in found.stages} == {0: 8, 1: 4}
    assert found.step_time_s == pytest.approx(4 * 8 + 31 * 8)


def test_a_cut_off_search_says_what_it_proved() -> None:
    tables = unlike_pair()
    whole = find_stages(tables)
    cut = find_stages(tables, max_solves=1)
    late = find_stages(tables, deadline=time.monotonic() - 1)
    for found in (cut, late):
        assert not found.complete
        assert found.lower_bound <= whole.step_time_s <= found.step_time_s
        check(tables, found)


def test_a_slow_middle_link_is_a_bottleneck() -> None:
    """One device does it all, once what passes takes longer than the work."""
    tables = unlike_pair(network=Link(latency_s=30.0, bandwidth_bytes_per_s=1e9))
    found = find_stages(tables)
    assert len(found.stages) == 1
    assert found.idle == (1, 2)


def test_groups_that_only_count_fits_are_not_placed() -> None:
    """Two nodes of three devices hold no two groups of two and one of two more."""
    layer = (LayerOption(forward_s=1.0, backward_s=2.0),)
    pair = LayerStrategy(name="pair", devices=(("a", 2),), layers=(layer,) * 6, static_bytes=(0.0,) * 6)
    tables = StageTables(
        pools=(Pool(name="a", nodes=(3, 3), memory_bytes=1.0),), strategies=(pair,), num_micro_batches=8,
        boundary_bytes=(0.0,) * 5, network=FREE,
    )
    found = find_stages(tables)
    assert len(found.stages) == 2  # three by counts alone
    check(tables, found)


def test_neighbours_share_a_node_where_the_network_is_slow() -> None:
    layer = (LayerOption(forward_s=1.0, backward_s=2.0),)
    half = LayerStrategy(name="half", devices=(("a", 2),), layers=(layer,) * 8, static_bytes=(0.0,) * 8)
    tables = StageTables(
        pools=(Pool(name="a", nodes=(4, 4), memory_bytes=1.0),), strategies=(half,), num_micro_batches=8,
        boundary_bytes=(1.0,) * 7, network=Link(latency_s=0.5, bandwidth_bytes_per_s=1e9), inside=(("a", FREE),),
    )
    found = find_stages(tables)
    nodes = [stage.nodes[0][1] for stage in found.stages]
    assert len(nodes) == 4
    assert sum(one != other for one, other in pairwise(nodes)) == 1
    assert found.step_time_s == pytest.approx(24 + 2 * 0.5 + 7 * 6, rel=1e-6)


def test_fewest_devices_and_least_cost() -> None:
    tables = unlike_pair()
    quick = find_stages(tables)
    few = find_stages(tables, objective=Objective(goal=Goal.DEVICES, max_step_time_s=500.0))
    assert few.step_time_s <= 500.0
    assert few.score[0] == 2.0  # one fast device takes 768, two 12 + 12 + 31 * 12 = 396
    cheap = find_stages(tables, objective=Objective(goal=Goal.COST))
    cost = cheap.score[0]
    prices = (3.0, 1.0)
    used = [2 - idle for idle in quick.idle]
    assert cost <= quick.step_time_s / 3600 * sum(n * price for n, price in zip(used, prices, strict=True))
    with pytest.raises(InfeasibleError, match="at most 100 s"):
        find_stages(tables, objective=Objective(goal=Goal.DEVICES, max_step_time_s=100.0))
    with pytest.raises(InputError, match="max-step-seconds"):
        Objective(goal=Goal.DEVICES)


def test_a_missing_price_is_said() -> None:
    pools = tuple(replace(pool, price_per_hour=None) for pool in unlike_pair().pools)
    with pytest.raises(InputError, match="price_per_hour"):
        find_stages(unlike_pair(pools=pools), objective=Objective(goal=Goal.COST))


def test_the_best_of_several_micro_batches() -> None:
    small = unlike_pair()
    large = unlike_pair(num_micro_batches=1, strategies=(alone("fast", 32.0), alone("slow", 64.0)))
    found = find_stages(large, small)
    assert found.problem == 1
    assert found.step_time_s == find_stages(small).step_time_s


def test_bad_tables_are_refused() -> None:
    with pytest.raises(InputError, match="costs of 24 layers"):
        unlike_pair(strategies=(alone("fast", 1.0, layers=3),))
    with pytest.raises(InputError, match="one name"):
        unlike_pair(pools=(Pool(name="a", nodes=(1,), memory_bytes=1.0),) * 2)
    with pytest.raises(InputError, match="pools"):
        unlike_pair(strategies=(alone("middle", 1.0),))
    with pytest.raises(InputError, match="num_micro_batches"):
        unlike_pair(num_micro_batches=0)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_unequal_shares_equal_brute_force(rows: int) -> None:
    times = [lambda r: 1.0 * r, lambda r: 0.5 + 2.0 * r, lambda r: 3.0 * r if r < 3 else float("inf")]
    best = min(
        max(times[i](r) if r else 0.0 for i, r in enumerate(shares))
        for shares in product(range(rows + 1), repeat=3) if sum(shares) == rows
    )
    found = unequal_shares(times, rows)
    assert sum(found.rows) == rows
    assert found.time_s == pytest.approx(best)


def test_the_same_answer_whatever_the_hash_seed() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from stage_brute_force import random_tables\n"
        "from autopar.search.stage_dp import find_stages\n"
        "from autopar.errors import InfeasibleError\n"
        "for seed in range(4):\n"
        "    try: print(find_stages(random_tables(seed)))\n"
        "    except InfeasibleError as error: print(error)\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, os.path.dirname(__file__)], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "7")
    ]
    assert runs[0] == runs[1]
    assert "FoundStages" in runs[0]


def test_the_documented_example_of_tables_works() -> None:
    """A fast device gets twice the layers of a slow one: 16 s a micro-batch each, 33 of those and the links."""
    text = tables_module.__doc__ or ""
    example = text[text.index("    from autopar") : text.index("    print(")]
    names: dict[str, object] = {}
    exec(textwrap.dedent(example), names)
    found = names["found"]
    assert isinstance(found, FoundStages)
    assert [(stage.first, stage.last, stage.strategy) for stage in found.stages] == [(0, 8, 1), (8, 24, 0)]
    assert found.step_time_s == pytest.approx(33 * 16 + 2 * 1e-3)
    assert found.gap == 0
