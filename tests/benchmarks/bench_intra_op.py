"""How long capture and search take, what they need and what they prove: python tests/benchmarks/bench_intra_op.py

    python tests/benchmarks/bench_intra_op.py [ROW ...] [--json]

A row a model and mesh, each in a fresh process: ops of its block classes, strategies over the mesh's inner axes,
entries of the largest table of an elimination, strategies kept when the bound had dropped the rest, CPU seconds of
capture and of search (imports apart), peak resident memory, what was found and the bound that was proved, in ms of a
layer (of a step, for plans), and the gap, (found - bound) / bound. Rows with a target are marked where they miss it.
A row of the zoo is `zoo/NAME`; `block/MODEL/MESH` is a layer on free axes, each of which may do anything, hidden
states passing between layers whole on all of them (`block/MODEL/MESH/sequence`: split by sequence over all).
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
    kept: int
    capture_s: float
    search_s: float
    rss_gib: float
    found_s: float
    bound_s: float
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
    blocks = _blocks(graph, parse_cluster(cluster), (4,), "bfloat16", all_classes=True)
    return Row(name=name, model=LLAMA, mesh=words, ops=blocks.ops, strategies=blocks.strategies, width=blocks.width,
               kept=blocks.kept, capture_s=capture_s, search_s=search_s, rss_gib=rss,
               found_s=plan.certificate.upper_bound_s, bound_s=plan.certificate.lower_bound_s,
               gap=plan.certificate.gap, target_s=target_s, target_gib=target_gib)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sums over classes, and the largest table and gap."""

    ops: int
    strategies: int
    width: int
    kept: int
    found_s: float
    bound_s: float
    gap: float


def _blocks(
    graph: ModelGraph, machine: Cluster, sizes: Sequence[int], dtype: str, *, all_classes: bool,
    free: bool = False, sequence: bool = False,
) -> Blocks:
    """The search of the chain's classes, or of the first layer's alone.

    All axes but the last split hidden states by sequence and leave parameters whole, unless axes are `free`.
    """
    from autopar.plan.plan import is_layer
    from autopar.search.intra_op import best_sharding
    from autopar.search.shardings import slowest_device, tp_group
    from autopar.sharding.joint import joint_strategies
    from autopar.sharding.state import R, shard
    from autopar.simulate.class_costs import ClassCosts
    from autopar.simulate.stage_cost import inner_axis

    rows = 8 if graph.rows_are_tagged else graph.rows
    names = [block.cls for block in graph.blocks if all_classes or is_layer(block.name)]
    ops = strategies = width = kept = 0
    found_s = bound_s = gap = 0.0
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
        if free:
            boundary, whole = (shard(1) if sequence else R,) * len(sizes), (False,) * len(sizes)
        else:
            boundary, whole = (*(shard(1) for _ in sizes[1:]), R), (*(True for _ in sizes[1:]), False)
        found = best_sharding(cls, options, boundary, costs, whole_params=whole)
        assert found is not None, f"{name} has no sharding"
        ops, strategies = ops + len(cls.ops), strategies + sum(map(len, options.values()))
        width, gap, kept = max(width, found.largest_table), max(gap, found.gap), kept + found.num_kept
        found_s, bound_s = found_s + found.cost_s, bound_s + found.lower_bound_s
    return Blocks(ops=ops, strategies=strategies, width=width, kept=kept, found_s=found_s, bound_s=bound_s, gap=gap)


def _block_row(
    name: str, model: str, length: int, sizes: tuple[int, ...], cluster: str, words: str, target_s: float | None, *,
    free: bool = False, sequence: bool = False,
) -> Row:
    """The first layer of a model, sharded over inner axes of these sizes; data axes give it fewer rows alone."""
    from autopar.cluster.parse import parse_cluster
    from autopar.graph.source import capture_source, load_source

    graph = capture_source(load_source(model, seq_len=length, dtype="bfloat16"))
    watch = Watch()
    found = _blocks(
        graph, parse_cluster(cluster), sizes, "bfloat16", all_classes=False, free=free, sequence=sequence
    )
    return Row(name=name, model=f"one layer of {model}", mesh=words, capture_s=0.0, search_s=watch.seconds,
               rss_gib=peak_gib(), target_s=target_s, **asdict(found))


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
    found = _blocks(graph, slow_cluster(2), (2,), DTYPE, all_classes=True)
    return Row(name=f"zoo/{name}", model=f"{name}, tiny", mesh="tp 2", capture_s=capture_s, search_s=watch.seconds,
               rss_gib=peak_gib(), target_s=None, **asdict(found))


ROWS: Mapping[str, Callable[[], Row]] = {
    "fixed": lambda: _plan_row("fixed", "4x8xH100-80GB", 256, "dp=8,tp=4", "data 8 x tp 4", 5.0, None),
    "all": lambda: _plan_row("all", "32x8xH100-80GB", 512, "", "all of 256 GPUs", 20.0, 1.0),
    "four": lambda: _block_row("four", LLAMA, LENGTH, (2, 2), "2x8xH100-80GB",
                               "dp_replicate 2 x dp_shard 2 x cp 2 x tp 2", 5.0),
    "joint": lambda: _block_row("joint", LLAMA, LENGTH, (2, 4), "2x8xH100-80GB", "cp 2 x tp 4", None),
}
MODELS = {LLAMA: 8192, "gpt2": 1024, "bert-large": 512, "mixtral-8x7b": 4096}
MESHES = {
    "8": "1x8xH100-80GB", "2,2": "1x8xH100-80GB", "8,4": "4x8xH100-80GB", "2,2,2": "1x8xH100-80GB",
    "4,2,2": "2x8xH100-80GB", "2,2,2,2": "2x8xH100-80GB", "2,2,2,2 alike": "1x16xH100-80GB",
}
FREE = [
    f"block/{model}/{mesh}{end}" for model in MODELS for mesh in MESHES
    for end in ("", "/sequence") if not end or mesh.startswith("2,2,2,2")
]


def _free_row(name: str) -> Row:
    """A layer on free axes."""
    _, model, mesh, *sequence = name.split("/")
    words = f"{mesh} on {MESHES[mesh]}{', sequence' if sequence else ''}"
    sizes = tuple(map(int, mesh.removesuffix(" alike").split(",")))
    return _block_row(name, model, MODELS[model], sizes, MESHES[mesh], words, 5.0, free=True, sequence=bool(sequence))


HEADER = (f"{'model':<26} {'mesh':<42} {'ops':>4} {'strategies':>10} {'width':>9} {'kept':>6} {'capture s':>9} "
          f"{'search s':>8} {'RSS GiB':>7} {'found ms':>10} {'bound ms':>10} {'gap':>7}")


def line(row: Row) -> str:
    """A row of the table."""
    missed = ""
    if row.missed:
        missed = f"  misses {row.target_s:g} s" + (f" or {row.target_gib:g} GiB" if row.target_gib else "")
    return (f"{row.model:<26} {row.mesh:<42} {row.ops:4d} {row.strategies:10d} {row.width:9d} {row.kept:6d} "
            f"{row.capture_s:9.2f} {row.search_s:8.2f} {row.rss_gib:7.2f} {1e3 * row.found_s:10.4f} "
            f"{1e3 * row.bound_s:10.4f} {row.gap:7.2%}{missed}")


def measured(name: str) -> Row:
    """A row, measured in a process of its own."""
    words = [sys.executable, __file__, name, "--here"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    from all_entries import ENTRIES

    known = [*ROWS, *FREE, *(f"zoo/{entry.name}" for entry in ENTRIES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = f"{', '.join(ROWS)}, block/MODEL/MESH or zoo/NAME; all if left out"
    parser.add_argument("names", nargs="*", metavar="ROW", help=words)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--here", action="store_true", help="measure one row in this process, as JSON")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(known)}")
    if options.here:
        warnings.simplefilter("ignore")
        import_all()
        name = options.names[0]
        made = ROWS[name]() if name in ROWS else (
            _free_row(name) if name in FREE else _zoo_row(name.removeprefix("zoo/")))
        print(json.dumps(asdict(made)))
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
