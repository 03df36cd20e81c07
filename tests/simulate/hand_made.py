"""A small chain of blocks, written by hand: two layers of two products with a residual sum, and a loss."""

from __future__ import annotations

from itertools import pairwise

from autopar.cluster.cluster import Cluster, DeviceType, Link, Node
from autopar.graph.model_graph import Block, BlockClass, ModelGraph, Op, Ref, TensorInfo
from autopar.plan.plan import Mesh, Plan, Recompute, Schedule, Stage
from autopar.sharding.state import RP, P, R, shard
from autopar.sharding.strategy import ClassSharding, Strategy

ROWS, SEQ, HIDDEN, INNER = 1009, 512, 2048, 8192


def info(name: str, *shape: int, grad: bool = True, dtype: str = "bfloat16") -> TensorInfo:
    return TensorInfo(name=name, shape=shape, dtype=dtype, requires_grad=grad)


def layer_class() -> BlockClass:
    tokens = (ROWS, SEQ)
    product = 2.0 * ROWS * SEQ * HIDDEN * INNER
    return BlockClass(
        name="layer", inputs=("x",), params=("up", "down"), buffers=(), outputs=("y",),
        ops=(
            Op(name="a", target="aten.linear.default", args=(Ref("x"), Ref("up")), outputs=("h",), flops=product,
               backward_flops=2 * product, saved=("x",)),
            Op(name="b", target="aten.relu.default", args=(Ref("h"),), outputs=("g",), saved=("g",)),
            Op(name="c", target="aten.linear.default", args=(Ref("g"), Ref("down")), outputs=("z",), flops=product,
               backward_flops=2 * product, saved=("g",)),
            Op(name="d", target="aten.add.Tensor", args=(Ref("x"), Ref("z")), outputs=("y",)),
        ),
        tensors=(
            info("x", *tokens, HIDDEN), info("up", INNER, HIDDEN), info("down", HIDDEN, INNER),
            info("h", *tokens, INNER), info("g", *tokens, INNER), info("z", *tokens, HIDDEN),
            info("y", *tokens, HIDDEN),
        ),
    )


def loss_class() -> BlockClass:
    return BlockClass(
        name="loss", inputs=("y",), params=("head",), buffers=(), outputs=("loss",),
        ops=(
            Op(name="m", target="aten.linear.default", args=(Ref("y"), Ref("head")), outputs=("s",),
               flops=2.0 * ROWS * SEQ * HIDDEN * 16, backward_flops=4.0 * ROWS * SEQ * HIDDEN * 16, saved=("y",)),
            Op(name="n", target="aten.mean.default", args=(Ref("s"),), outputs=("loss",)),
        ),
        tensors=(info("y", ROWS, SEQ, HIDDEN), info("head", 16, HIDDEN), info("s", ROWS, SEQ, 16), info("loss")),
    )


def start_class() -> BlockClass:
    return BlockClass(
        name="start", inputs=("ids",), params=("table",), buffers=(), outputs=("x",),
        ops=(Op(name="e", target="aten.embedding.default", args=(Ref("table"), Ref("ids")), outputs=("x",),
                saved=("ids",)),),
        tensors=(
            info("ids", ROWS, SEQ, grad=False, dtype="int64"), info("table", 1000, HIDDEN),
            info("x", ROWS, SEQ, HIDDEN),
        ),
    )


def graph(num_layers: int = 2) -> ModelGraph:
    classes = (start_class(), layer_class(), loss_class())
    layers = tuple(
        Block(
            name=f"layers.{i}", cls="layer", inputs=(f"x{i}",), params=(f"layers.{i}.up", f"layers.{i}.down"),
            buffers=(), outputs=(f"x{i + 1}",),
        )
        for i in range(num_layers)
    )
    blocks = (
        Block(name="prologue", cls="start", inputs=("ids",), params=("table",), buffers=(), outputs=("x0",)), *layers,
        Block(name="epilogue", cls="loss", inputs=(f"x{num_layers}",), params=("head",), buffers=(), outputs=("loss",)),
    )
    params = [info("table", 1000, HIDDEN), info("head", 16, HIDDEN)]
    for i in range(num_layers):
        params += [info(f"layers.{i}.up", INNER, HIDDEN), info(f"layers.{i}.down", HIDDEN, INNER)]
    return ModelGraph(
        name="hand-made", rows=ROWS, rows_are_tagged=True, inputs=(info("ids", ROWS, SEQ, grad=False, dtype="int64"),),
        params=tuple(params), buffers=(), aliases=(), classes=classes, blocks=blocks,
        shared=Block(name="shared", cls="", inputs=(), params=(), buffers=(), outputs=()), loss="loss",
    )


def megatron() -> tuple[ClassSharding, ...]:
    """Column and row products in the layers; nothing split outside."""
    return (
        ClassSharding(
            cls="layer", inputs=(R,), params=(shard(0), shard(1)), buffers=(), outputs=(R,),
            ops=(
                ("a", Strategy(factor="n", inputs=(RP, shard(0)), outputs=(shard(2),))),
                ("b", Strategy(factor="n", inputs=(shard(2),), outputs=(shard(2),))),
                ("c", Strategy(factor="k", inputs=(shard(2), shard(1)), outputs=(P,))),
                ("d", Strategy(factor="", inputs=(R, R), outputs=(R,))),
            ),
        ),
        *(
            ClassSharding(cls=cls, inputs=(R,), params=(R,), buffers=(), outputs=(R,), ops=())
            for cls in ("start", "loss")
        ),
    )


# Rates whose source says that they were measured are taken at their word, so that times can be worked out by hand.
DEVICE = DeviceType(
    name="hand", memory_bytes=64 * 2**30, memory_bandwidth_bytes_per_s=1e12,
    peak_flops=(("bfloat16", 100e12), ("float32", 20e12)), kernel_launch_s=1e-6,
    sources=(("peak_flops.bfloat16", "measured"), ("memory_bandwidth_bytes_per_s", "measured")),
)
LINK = Link(name="hand", latency_s=1e-6, bandwidth_bytes_per_s=100e9, source="measured")
NETWORK = Link(name="network", latency_s=5e-6, bandwidth_bytes_per_s=20e9, source="measured")


def cluster(num_nodes: int = 1, per_node: int = 8) -> Cluster:
    return Cluster(
        name="hand", nodes=(Node(device=DEVICE, num_devices=per_node, link=LINK, network=NETWORK),) * num_nodes
    )


def plan(
    model: ModelGraph, *, cuts: tuple[int, ...] | None = None, mesh: Mesh | None = None, zero: int = 0,
    recompute: Recompute = Recompute.NONE, schedule: Schedule = Schedule.ONE_F_ONE_B, micro_batch: int = 4,
    num_micro_batches: int = 4, num_chunks: int = 1, compiled: bool = False, dtype: str = "bfloat16",
) -> Plan:
    mesh = mesh or Mesh()
    cuts = cuts or (0, len(model.blocks))
    num_groups = (len(cuts) - 1) // num_chunks
    stages = tuple(
        Stage(
            first=first, last=last, mesh=mesh, zero=zero, recompute=recompute, virtual=i // num_groups,
            devices=tuple(range(i % num_groups * mesh.size, (i % num_groups + 1) * mesh.size)),
        )
        for i, (first, last) in enumerate(pairwise(cuts))
    )
    return Plan(
        model_name=model.name, model_fingerprint="", cluster_name="hand", cluster_fingerprint="",
        num_devices=num_groups * mesh.size, global_batch=micro_batch * num_micro_batches * mesh.dp, seq_len=SEQ,
        dtype=dtype, param_dtype="float32", optimizer="adamw", micro_batch=micro_batch,
        num_micro_batches=num_micro_batches, schedule=schedule, sequence_parallel=False, stages=stages,
        shardings=megatron() if mesh.tp > 1 else (), compile=compiled,
    )
