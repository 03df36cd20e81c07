"""How long capture and search take, what they need and what they prove: python tests/benchmarks/bench_intra_op.py

    python tests/benchmarks/bench_intra_op.py [ROW ...] [--json]

A row a model and mesh, each in a fresh process: ops of its block classes, strategies over the mesh's inner axes,
entries of the largest table of an elimination, CPU seconds of capture and of search (imports apart), peak resident
memory, and the gap, (cost - lower bound) / lower bound: of blocks their sharding's, of plans the certificate's.
Rows with a target are marked where they miss it. A row of the zoo is `zoo/NAME`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster
    from autopar.graph.model_graph import ModelGraph

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))

LLAMA, LENGTH = "llama-3.1-8b", 8192


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured row; `target_s` is for capture and search together."""

    name: str
    model: str
    mesh: str
    ops: int
    strategies: int
    width: int
    capture_s: float
    search_s: float
    rss_gib: float
    gap: float
    target_s: float | None
    target_gib: float | None = None

    @property
    def missed(self) -> bool:
        late = self.target_s is not None and self.capture_s + self.search_s > self.target_s
        return late or (self.target_gib is not None and self.rss_gib > self.target_gib)


class Watch:
    """CPU seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self._began


def peak_gib() -> float:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def import_all() -> None:
    """What capture and search import when they are first used."""
    for name in ("transformers.models.llama.modeling_llama", "autopar.search.planner", "autopar.graph.source"):
        importlib.import_module(name)


def _plan_row(
    name: str, cluster: str, batch: int, mesh: str, words: str, target_s: float, target_gib: float | None
) -> Row:
    """The whole planner on Llama. Strategies and width are those of its tensor axis, 4 where that is searched."""
    from autopar.cluster.parse import parse_cluster
    from autopar.graph.source import capture_source, load_source
    from autopar.search.candidates import PlanRequest, parse_mesh
    from autopar.search.planner import find_plan

    watch = Watch()
    graph = capture_source(load_source(LLAMA, seq_len=LENGTH, dtype="bfloat16"))
    capture_s, watch = watch.seconds, Watch()
    plan = find_plan(graph, parse_cluster(cluster), PlanRequest(
        global_batch=batch, seq_len=LENGTH, mesh=parse_mesh(mesh) if mesh else (),
    ))
    search_s, rss = watch.seconds, peak_gib()
    assert plan.certificate is not None
    ops, strategies, width, _ = _blocks(graph, parse_cluster(cluster), (4,), "bfloat16", all_classes=True)
    return Row(name=name, model=LLAMA, mesh=words, ops=ops, strategies=strategies, width=width, capture_s=capture_s,
               search_s=search_s, rss_gib=rss, gap=plan.certificate.gap, target_s=target_s, target_gib=target_gib)


def _blocks(
    graph: ModelGraph, machine: Cluster, sizes: Sequence[int], dtype: str, *, all_classes: bool
) -> tuple[int, int, int, float]:
    """Ops, strategies, largest table and largest gap of the chain's classes, or of the first layer's alone."""
    from autopar.plan.plan import is_layer
    from autopar.search.intra_op import best_sharding
    from autopar.search.shardings import slowest_device, tp_group
    from autopar.sharding.joint import joint_strategies
    from autopar.sharding.state import R, shard
    from autopar.simulate.class_costs import ClassCosts
    from autopar.simulate.stage_cost import inner_axis

    rows = 8 if graph.rows_are_tagged else graph.rows
    names = [block.cls for block in graph.blocks if all_classes or is_layer(block.name)]
    ops = strategies = width = 0
    gap = 0.0
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    outer = tuple(
        inner_axis(machine, tuple(i * stride for i in range(size)))
        for size, stride in zip(sizes[:-1], strides, strict=False)
    )
    for name in dict.fromkeys(names if all_classes else names[:1]):
        cls = graph.block_class[name]
        costs = ClassCosts(graph, cls, tp=sizes[-1], rows=rows, device=slowest_device(machine),
                           tp_group=tp_group(machine, sizes[-1]), dtype=dtype, outer=outer)
        options = joint_strategies(cls, sizes)
        boundary = (*(shard(1) for _ in sizes[1:]), R)
        found = best_sharding(cls, options, boundary, costs, whole_params=(*(True for _ in sizes[1:]), False))
        assert found is not None, f"{name} has no sharding"
        ops, strategies = ops + len(cls.ops), strategies + sum(map(len, options.values()))
        width, gap = max(width, found.largest_table), max(gap, found.gap)
    return ops, strategies, width, gap


def _block_row(name: str, sizes: tuple[int, ...], words: str, target_s: float | None) -> Row:
    """The first layer of Llama, sharded over inner axes of these sizes; data axes give it fewer rows alone."""
    from autopar.cluster.parse import parse_cluster
    from autopar.graph.source import capture_source, load_source

    watch = Watch()
    graph = capture_source(load_source(LLAMA, seq_len=LENGTH, dtype="bfloat16"))
    capture_s, watch = watch.seconds, Watch()
    ops, strategies, width, gap = _blocks(graph, parse_cluster("2x8xH100-80GB"), sizes, "bfloat16", all_classes=False)
    return Row(name=name, model=f"one layer of {LLAMA}", mesh=words, ops=ops, strategies=strategies, width=width,
               capture_s=capture_s, search_s=watch.seconds, rss_gib=peak_gib(), gap=gap, target_s=target_s)


def _zoo_row(name: str) -> Row:
    """A tiny model of the zoo on a tensor axis of two slow devices."""
    from all_entries import ENTRIES
    from harness import DTYPE
    from local_machines import slow_cluster

    from autopar.runtime.parity import capture_for

    entry = next(entry for entry in ENTRIES if entry.name == name)
    entry.build()  # imports the model's own modules
    watch = Watch()
    graph = capture_for(entry.build, DTYPE).graph
    capture_s, watch = watch.seconds, Watch()
    ops, strategies, width, gap = _blocks(graph, slow_cluster(2), (2,), DTYPE, all_classes=True)
    return Row(name=f"zoo/{name}", model=f"{name}, tiny", mesh="tp 2", ops=ops, strategies=strategies, width=width,
               capture_s=capture_s, search_s=watch.seconds, rss_gib=peak_gib(), gap=gap, target_s=None)


ROWS: Mapping[str, Callable[[], Row]] = {
    "fixed": lambda: _plan_row("fixed", "4x8xH100-80GB", 256, "dp=8,tp=4", "data 8 x tp 4", 5.0, None),
    "all": lambda: _plan_row("all", "32x8xH100-80GB", 512, "", "all of 256 GPUs", 20.0, 1.0),
    "four": lambda: _block_row("four", (2, 2), "dp_replicate 2 x dp_shard 2 x cp 2 x tp 2", 5.0),
    "joint": lambda: _block_row("joint", (2, 4), "cp 2 x tp 4", None),
}
HEADER = (f"{'model':<26} {'mesh':<42} {'ops':>4} {'strategies':>10} {'width':>9} {'capture s':>9} {'search s':>8} "
          f"{'RSS GiB':>7} {'gap':>7}")


def line(row: Row) -> str:
    """A row of the table."""
    missed = ""
    if row.missed:
        missed = f"  misses {row.target_s:g} s" + (f" or {row.target_gib:g} GiB" if row.target_gib else "")
    return (f"{row.model:<26} {row.mesh:<42} {row.ops:4d} {row.strategies:10d} {row.width:9d} {row.capture_s:9.2f} "
            f"{row.search_s:8.2f} {row.rss_gib:7.2f} {row.gap:7.2%}{missed}")


def measured(name: str) -> Row:
    """A row, measured in a process of its own."""
    words = [sys.executable, __file__, name, "--here"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    from all_entries import ENTRIES

    known = [*ROWS, *(f"zoo/{entry.name}" for entry in ENTRIES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)} or zoo/NAME; all if left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--here", action="store_true", help="measure one row in this process, as JSON")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(known)}")
    if options.here:
        warnings.simplefilter("ignore")
        import_all()
        name = options.names[0]
        print(json.dumps(asdict(ROWS[name]() if name in ROWS else _zoo_row(name.removeprefix("zoo/")))))
        return
    rows = []
    if not options.json:
        print(HEADER)
    for name in options.names or known:
        rows.append(measured(name))
        if not options.json:
            print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"rows": [asdict(row) | {"missed": row.missed} for row in rows]}))
    else:
        largest = max((row.gap for row in rows if row.name.startswith("zoo/")), default=0.0)
        print(f"largest gap of a block of the zoo: {largest:.2%}")


if __name__ == "__main__":
    main()
