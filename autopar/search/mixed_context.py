"""Where context axes promise quicker stages of their own meshes: an estimate that makes no shardings for such axes.

A step with so many micro-batches is estimated by the work of blocks alone, spread over all devices at will, with and
without settings whose rows do not suffice for all ranks: there the context axis counts as a data axis of as many parts
of a row. That is well below what a plan takes, as links, data axes and whole layers come on top; so the estimates are
compared with one another. What activations take at least is counted, and what layers then recompute: mostly for that a
context axis pays where sequences are long, as it has less than a row on a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cost_models.memory import static_bytes
from autopar.plan.plan import Recompute, Variant
from autopar.search.best_first import Engine
from autopar.search.candidates import Candidate, axis_variants, divisors, fewest_context_ranks
from autopar.search.context import PROMISE
from autopar.search.elimination import Table
from autopar.search.mixed_costs import ClusterPools
from autopar.search.variants import Options
from autopar.sharding.rewrite import Rewrite


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Option:
    """A setting of a pool's devices: seconds and bytes of each block of the chain for a micro-batch on its ranks."""

    pool: int
    size: int
    cp: int
    tp: int
    sequence_parallel: bool
    work_s: Table
    recompute_s: Table  # what recomputing each block adds; 0 where it is no layer
    saved_bytes: float  # of all blocks
    least_bytes: float  # with all layers recomputed or offloaded
    limit_bytes: float


def promising_counts(engine: Engine, pools: ClusterPools, best_s: float) -> list[int]:
    """The numbers of micro-batches for which context axes promise more than all plans without, those of most first.

    `best_s`: the best plan without. Where there is none, all numbers for which some axis is there.
    """
    if not engine.chooser.has_hidden_states:
        return []
    plain_s, context_s = math.inf, dict[int, float]()
    for count in divisors(engine.request.global_batch):
        options = _options(engine, pools, count)
        plain_s = min(plain_s, _estimated_s(engine, pools, count, [own for own in options if own.cp == 1]))
        if any(own.cp > 1 for own in options):
            context_s[count] = _estimated_s(engine, pools, count, options)
    limit_s = min(plain_s, best_s) * (1 - PROMISE) if math.isfinite(best_s) else math.inf
    return sorted((count for count, own in context_s.items() if own < limit_s), key=lambda own: (context_s[own], own))


def context_families(engine: Engine, pools: ClusterPools, count: int) -> list[tuple[Rewrite, ...]]:
    """The sets of rewrites that context axes choose with so many micro-batches, alone or beside a tensor axis."""
    found: dict[tuple[Rewrite, ...], None] = {}
    for axes in dict.fromkeys((own.cp, own.tp, own.sequence_parallel) for own in _options(engine, pools, count)):
        cp, tp, sequence_parallel = axes
        if cp > 1 and (choice := engine.chooser.choose(tp, sequence_parallel=sequence_parallel, cp=cp)) is not None:
            found[choice.rewrites] = None
    return list(found)


def _options(engine: Engine, pools: ClusterPools, count: int) -> list[_Option]:
    rows, found = engine.request.global_batch // count, []
    for pool, own in enumerate(pools.pools):
        for size in pools.sizes(pool):
            for tp in divisors(min(size, own.node_size)):
                cp = fewest_context_ranks(rows, size // tp, tp, own.node_size, engine.request.micro_batch)
                variants = [each for each in axis_variants(engine.chooser, tp) if each[1]][-1:]
                if cp is None or not variants:
                    continue
                c = Candidate(
                    pp=2, tp=tp, dp_replicate=size // tp, dp_shard=1, zero=0, offload_optimizer=False,
                    sequence_parallel=variants[0][0], split_weights=True, spread=cp, num_micro_batches=count,
                    micro_batch=rows * cp * tp // size,
                )
                kind = engine.layout.kind_of(c, pools.ranks(pool, 0, size))
                blocks = engine.bounds.block_table(c, kind)
                sort, is_layer = blocks.sorts.sort, blocks.kind >= 0
                again_s = np.array([_recomputed_s(options) for options in blocks.kinds] or [0.0])
                found.append(_Option(
                    pool=pool, size=size, cp=cp, tp=tp, sequence_parallel=c.sequence_parallel,
                    work_s=(blocks.forward_s + blocks.backward_s)[sort],
                    recompute_s=np.where(is_layer, again_s[blocks.kind], 0.0)[sort],
                    saved_bytes=float(blocks.saved_bytes[sort].sum()),
                    least_bytes=float(np.where(is_layer, blocks.least_held, blocks.saved_bytes)[sort].sum()),
                    limit_bytes=kind.memory_limit_bytes,
                ))
    return found


def _recomputed_s(options: Options) -> float:
    """Seconds that recomputing a layer as a whole adds, or else what the option that holds least adds."""
    full = [own for own in options if own.variant == Variant(recompute=Recompute.FULL)]
    own = full[0] if full else min(options, key=lambda option: option.held_bytes)
    return own.forward_s + own.backward_s


def _estimated_s(engine: Engine, pools: ClusterPools, count: int, options: Sequence[_Option]) -> float:
    """Seconds of a step under the best of the options; infinite where a pool has none that fits."""
    estimate_s, shares = _shared(pools, count, [(own, own.work_s) for own in options])
    if math.isinf(estimate_s):
        return estimate_s
    request = engine.request
    numel = sum(param.numel for param in engine.graph.params)
    fitting: list[tuple[_Option, Table]] = []
    for own in options:
        # At least the micro-batch in hand is there in all of the pool's stages, and their states are shared out.
        share = float(shares[own.pool])
        states = static_bytes(
            share * numel, zero=3, num_shards=pools.pools[own.pool].num_devices, dtype=request.dtype,
            param_dtype=request.param_dtype, optimizer=request.optimizer, unit_numel=0.0, root_numel=0.0,
        )
        room = own.limit_bytes - states.total
        saved, least = share * own.saved_bytes, share * own.least_bytes
        if least <= room:
            part = (saved - room) / (saved - least) if saved > room else 0.0
            fitting.append((own, own.work_s + part * own.recompute_s))
    return _shared(pools, count, fitting)[0]


def _shared(pools: ClusterPools, count: int, options: Sequence[tuple[_Option, Table]]) -> tuple[float, Table]:
    """Seconds of a step by what each block takes under each option, and each pool's share of the work.

    The first micro-batch goes through all blocks where they are quickest; the others keep all devices busy.
    """
    num_pools = len(pools.pools)
    if {own.pool for own, _ in options} != set(range(num_pools)):
        return math.inf, np.zeros(num_pools)
    device_s = np.full((num_pools, len(options[0][1])), np.inf)
    for own, work_s in options:
        device_s[own.pool] = np.minimum(device_s[own.pool], own.size * work_s)
    total_s = device_s.sum(axis=1)
    if not total_s.all():
        return 0.0, np.zeros(num_pools)
    speeds = np.array([own.num_devices for own in pools.pools]) / total_s
    each_s = float((device_s / total_s[:, None]).min(axis=0).sum() / speeds.sum())
    first_s = float(np.min([work_s for _, work_s in options], axis=0).sum())
    return first_s + (count - 1) * each_s, np.asarray(speeds / speeds.sum())
