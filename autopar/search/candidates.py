"""What the planner searches over: the request, and every setting of degrees that a cluster and a batch allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopar.cluster.cluster import Cluster
from autopar.cost_models.memory import OPTIMIZER_STATE_BYTES
from autopar.errors import InfeasibleError, InputError
from autopar.plan.plan import Mesh
from autopar.search.shardings import ShardingChooser


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a plan is for. `micro_batch` fixes the rows of a micro-batch of one replica; None searches it."""

    global_batch: int
    seq_len: int | None = None
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    optimizer: str = "adamw"
    micro_batch: int | None = None
    max_search_seconds: float | None = None
    compile: bool = False
    offload: bool = True  # whether activations and optimizer state may rest in host memory
    unlike_stages: bool = True  # whether stages of a cluster of unlike nodes may have meshes of their own
    mesh: tuple[tuple[str, int], ...] = ()  # axes of MESH_AXES whose size the user fixed; the others are searched

    def allows(self, candidate: Candidate) -> bool:
        """Whether the candidate has the sizes that the user fixed; an expert axis is made of its data ranks."""
        return all(axis == "ep" or getattr(candidate, axis) == size for axis, size in self.mesh)


Work = tuple[int, int, int, int, int, bool, bool, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Candidate:
    """One setting of everything but where the chain is cut, and what layers recompute and offload so that they fit.

    Their order breaks ties between equally fast plans.
    `split_weights`: the shardings that split weights over the tensor axis; else those that may keep them whole.
    `spread`: for estimates, a micro-batch's rows are counted as this many times fewer.
    `free_offload`: for bounds, the optimizer is offloaded and that takes no time.
    """

    pp: int
    tp: int
    dp_replicate: int
    dp_shard: int
    zero: int
    sequence_parallel: bool
    offload_optimizer: bool
    micro_batch: int
    num_micro_batches: int
    split_weights: bool = True
    cp: int = 1
    spread: int = 1
    free_offload: bool = False

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def num_shards(self) -> int:
        """Ranks that share the shards of a parameter where ZeRO shards it."""
        return self.dp_shard * self.cp

    @property
    def rows(self) -> float:
        """Rows of a micro-batch, as costs count them."""
        return self.micro_batch / self.spread

    @property
    def work(self) -> Work:
        """What tells the work of its blocks on its devices, whatever data ranks share out; alike where that is."""
        return (
            self.pp, self.tp, self.cp, self.dp_replicate * self.dp_shard, self.spread, self.sequence_parallel,
            self.split_weights, self.micro_batch, self.num_micro_batches,
        )

    @property
    def mesh(self) -> Mesh:
        return Mesh(dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, tp=self.tp, cp=self.cp)

    @property
    def summary(self) -> str:
        """The settings in a few words."""
        words = [f"pp {self.pp}"] if self.pp > 1 else []
        words += [f"tp {self.tp}{' + sequence' if self.sequence_parallel else ''}"] if self.tp > 1 else []
        words += [f"cp {self.cp}"] if self.cp > 1 else []
        both = self.dp_replicate > 1 < self.dp_shard
        words += [f"dp {self.dp_replicate}x{self.dp_shard}" if both else f"dp {self.dp}"]
        words += [f"zero {self.zero}", f"micro-batch {self.micro_batch} x {self.num_micro_batches}"]
        words += ["optimizer offloaded"] if self.offload_optimizer else []
        return ", ".join(words)


MESH_AXES = ("pp", "dp", "dp_replicate", "dp_shard", "ep", "cp", "tp")


def parse_mesh(text: str) -> tuple[tuple[str, int], ...]:
    """The axes and sizes of "dp=8,tp=4"; InputError for an unknown axis, a size that is none, or an axis twice."""
    found: dict[str, int] = {}
    for item in text.split(","):
        axis, equals, size = (part.strip() for part in item.partition("="))
        is_size = bool(equals) and size.isdecimal()
        ((axis, number),) = fixed_axes({axis: int(size) if is_size else size}, "--mesh")
        if axis in found:
            raise InputError(f"--mesh gives {axis} twice; give each axis one size")
        found[axis] = number
    return tuple(found.items())


def fixed_axes(mesh: Mapping[str, object], word: str = "mesh") -> tuple[tuple[str, int], ...]:
    """The axes of {"dp": 8, "tp": 4}; InputError, which calls it `word`, for an unknown axis or a size that is none."""
    for axis, size in mesh.items():
        if axis not in MESH_AXES:
            raise InputError(f"{word} has no axis {axis!r}; write AXIS=SIZE of {', '.join(MESH_AXES)}, as in dp=8,tp=4")
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{word} gives {axis} the size '{size}'; write a whole number from 1 on, as in {axis}=4")
    return tuple((axis, size) for axis, size in mesh.items() if isinstance(size, int))


def divisors(number: int) -> list[int]:
    """The divisors of a number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def node_size(cluster: Cluster) -> int:
    """The largest number of ranks that every aligned tensor group can have inside a node."""
    return min(node.num_devices for node in cluster.nodes)


def meshes(cluster: Cluster, num_blocks: int, *, tp_across_nodes: bool = False) -> Iterator[tuple[int, int, int]]:
    """(pp, tp, dp) that use every device once, with no more stages than blocks; tp inside nodes unless told."""
    inside = node_size(cluster)
    for tp in divisors(cluster.num_devices):
        if tp > 1 and not tp_across_nodes and (tp > inside or any(node.num_devices % tp for node in cluster.nodes)):
            continue
        for pp in divisors(cluster.num_devices // tp):
            if pp <= num_blocks:
                yield pp, tp, cluster.num_devices // tp // pp


def fewest_context_ranks(rows: int, ranks: int, tp: int, node_size: int, micro_batch: int | None) -> int | None:
    """The size of a context axis that leaves just as many of the ranks to data axes as can share out the rows.

    A longer one only sends more: a rank has as many tokens under all of them. `ranks`: of both axes, `tp` devices each;
    the context axis lies inside nodes of `node_size`. `micro_batch`: the rows of a data rank, where they are fixed.
    None where no such axis does.
    """
    for cp in divisors(ranks):
        dp = ranks // cp
        if rows % dp == 0 and micro_batch in (None, rows // dp):
            return cp if cp == 1 or node_size % (cp * tp) == 0 else None
    return None


def data_settings(cluster: Cluster, tp: int, dp: int) -> list[tuple[int, int, int]]:
    """(zero, dp_replicate, dp_shard): replicas, and each ZeRO level over all data ranks or over those of a node."""
    found = [(0, dp, 1)]
    if dp == 1:
        return found
    shards = [dp]
    inside = node_size(cluster) // tp
    if 1 < inside < dp and dp % inside == 0:
        shards.append(inside)
    return found + [(zero, dp // shard, shard) for zero in (1, 2, 3) for shard in shards]


def candidates(
    cluster: Cluster, request: PlanRequest, chooser: ShardingChooser, num_blocks: int, *, tp_across_nodes: bool = False
) -> list[Candidate]:
    """Every candidate, in their order. InfeasibleError, naming near batches, where no mesh divides the batch."""
    found: list[Candidate] = []
    row_counts: set[tuple[int, int]] = set()
    one_part, fixed_sizes, others = chooser.needs_whole_batch, dict(request.mesh), False
    offloads = (False, True) if _can_offload_state(cluster, request) else (False,)
    for pp, tp, dp in meshes(cluster, num_blocks, tp_across_nodes=tp_across_nodes):
        if one_part and (dp > 1 or (request.micro_batch or request.global_batch) < request.global_batch):
            continue
        row_counts.add((dp * (request.micro_batch or 1), tp))
        if request.global_batch % (dp * (request.micro_batch or 1)):
            continue
        if any(fixed_sizes.get(axis, size) != size for axis, size in (("pp", pp), ("tp", tp), ("dp", dp), ("cp", 1))):
            others = True  # shardings are not chosen for an axis that cannot be
            continue
        rows = request.global_batch // dp
        sizes = [request.micro_batch] if request.micro_batch else divisors(rows)
        sizes = [rows] if one_part else sizes
        for sequence_parallel, split_weights in axis_variants(chooser, tp):
            for zero, replicate, shard in data_settings(cluster, tp, dp):
                found += [
                    Candidate(
                        pp=pp, tp=tp, dp_replicate=replicate, dp_shard=shard, zero=zero, offload_optimizer=offload,
                        sequence_parallel=sequence_parallel, split_weights=split_weights, micro_batch=size,
                        num_micro_batches=rows // size,
                    )
                    for size in sizes for offload in offloads
                ]
    fixed = [candidate for candidate in found if request.allows(candidate)]
    if (found or others) and not fixed and "cp" not in fixed_sizes:
        raise InputError(no_mesh(cluster, request, one_part))
    if not found and not row_counts:
        raise InfeasibleError(f"no plan computes the batch in one part: {one_part}")
    if not found and not request.mesh:
        counts = {rows for rows, tp in row_counts if axis_variants(chooser, tp)}  # other axes have nothing to split
        raise InfeasibleError(_no_batch(cluster, request, counts))
    return sorted(fixed)


def no_mesh(cluster: Cluster, request: PlanRequest, one_part: str) -> str:
    """What to say where no candidate has the fixed axes; `one_part`: why the batch is computed in one part, or ""."""
    words = ",".join(f"{axis}={size}" for axis, size in request.mesh)
    start = (
        f"no plan on the {cluster.num_devices} devices of {cluster.name} has the mesh {words} with a global batch of "
        f"{request.global_batch}"
    )
    if one_part and any(axis in ("dp", "dp_replicate", "dp_shard") and size > 1 for axis, size in request.mesh):
        return f"{start}: {one_part}"
    return (
        f"{start}: sizes must divide the devices, dp the batch, tp a node, pp the layers and cp the sequence; tp must "
        "split the work of some op; change or leave out an axis"
    )


def _can_offload_state(cluster: Cluster, request: PlanRequest) -> bool:
    state = OPTIMIZER_STATE_BYTES.get(request.optimizer, 0)
    return request.offload and state > 0 and all(node.device.host_bandwidth_bytes_per_s for node in cluster.nodes)


def axis_variants(chooser: ShardingChooser, tp: int) -> list[tuple[bool, bool]]:
    """(sequence_parallel, split_weights) that give different shardings on an axis of `tp` ranks."""
    if tp == 1:
        return [(False, True)]
    found: list[tuple[bool, bool]] = []
    seen = []
    for sequence_parallel in (False, True) if chooser.has_hidden_states else (False,):
        for split_weights in (True, False):
            choice = chooser.choose(tp, sequence_parallel=sequence_parallel, split_weights=split_weights)
            if choice is not None and choice.splits and choice.shardings not in seen:
                seen.append(choice.shardings)
                found.append((sequence_parallel, split_weights))
    return found


def _no_batch(cluster: Cluster, request: PlanRequest, row_counts: set[int]) -> str:
    batch = request.global_batch
    below = max((batch // rows * rows for rows in row_counts if rows <= batch), default=0)
    above = min(-(-batch // rows) * rows for rows in row_counts)
    near = f"{below} or {above}" if below else str(above)
    fixed = f" in micro-batches of {request.micro_batch}" if request.micro_batch else ""
    return (
        f"no plan on the {cluster.num_devices} devices of {cluster.name} divides a global batch of {batch}{fixed} over "
        f"its data-parallel replicas; the nearest that do: {near}"
    )
