"""Small hand-made models and clusters for the tests of search and plan."""

from __future__ import annotations

import dataclasses
import math

from autopar.cluster.cluster import Cluster, DeviceType, Link, Node
from autopar.graph.model_graph import Arg, Block, BlockClass, ModelGraph, Op, Ref, TensorInfo

ROWS = 1009
MATMUL = "aten.linear.default"


class ClassBuilder:
    """Collects the ops of one block class; all float tensors have gradients."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, TensorInfo] = {}
        self.inputs: list[str] = []
        self.params: list[str] = []
        self.ops: list[Op] = []

    def input(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> str:
        self.tensors[name] = TensorInfo(name=name, shape=shape, dtype=dtype, requires_grad=dtype == "float32")
        self.inputs.append(name)
        return name

    def param(self, name: str, shape: tuple[int, ...]) -> str:
        self.tensors[name] = TensorInfo(name=name, shape=shape, dtype="float32", requires_grad=True)
        self.params.append(name)
        return name

    def op(self, target: str, args: tuple[Arg, ...], out: str, shape: tuple[int, ...], saved: tuple[str, ...] = (),
           flops: float = 0.0) -> str:
        self.tensors[out] = TensorInfo(name=out, shape=shape, dtype="float32", requires_grad=True)
        self.ops.append(Op(name=f"op_{out}", target=target, args=args, outputs=(out,), saved=saved, flops=flops,
                           backward_flops=2 * flops))
        return out

    def linear(self, x: str, weight: str, out: str) -> str:
        shape, (n, k) = self.tensors[x].shape, self.tensors[weight].shape
        return self.op(MATMUL, (Ref(x), Ref(weight)), out, (*shape[:-1], n), saved=(x,),
                       flops=2.0 * math.prod(shape[:-1]) * n * k)

    def gelu(self, x: str, out: str) -> str:
        return self.op("aten.gelu.default", (Ref(x),), out, self.tensors[x].shape, saved=(x,))

    def add(self, x: str, y: str, out: str) -> str:
        return self.op("aten.add.Tensor", (Ref(x), Ref(y)), out, self.tensors[x].shape)

    def build(self, *outputs: str) -> BlockClass:
        return BlockClass(name=self.name, inputs=tuple(self.inputs), params=tuple(self.params), buffers=(),
                          outputs=outputs, ops=tuple(self.ops), tensors=tuple(self.tensors.values()))


def mlp_class(hidden: int, inner: int, seq_len: int) -> BlockClass:
    """A residual block: x + down(gelu(up(x)))."""
    build = ClassBuilder("layer")
    x = build.input("x", (ROWS, seq_len, hidden))
    up, down = build.param("up", (inner, hidden)), build.param("down", (hidden, inner))
    build.add(x, build.linear(build.gelu(build.linear(x, up, "wide"), "active"), down, "narrow"), "y")
    return build.build("y")


def mlp_chain(
    num_layers: int = 4, hidden: int = 64, inner: int = 256, seq_len: int = 32, vocab: int = 128,
    tied: bool = False,
) -> ModelGraph:
    """Embedding, `num_layers` residual blocks, head (its weight the embedding's if tied) and cross entropy."""
    first = ClassBuilder("prologue")
    first.input("ids", (ROWS, seq_len), "int64")
    first.param("table", (vocab, hidden))
    first.op("aten.embedding.default", (Ref("table"), Ref("ids")), "x", (ROWS, seq_len, hidden))
    last = ClassBuilder("epilogue")
    last.input("x", (ROWS, seq_len, hidden))
    last.input("labels", (ROWS, seq_len), "int64")
    last.param("head", (vocab, hidden))
    last.linear("x", "head", "logits")
    last.op("aten.view.default", (Ref("logits"), (-1, vocab)), "flat", (ROWS * seq_len, vocab))
    last.tensors["flat_labels"] = TensorInfo(name="flat_labels", shape=(ROWS * seq_len,), dtype="int64")
    last.ops.append(Op(name="op_flat_labels", target="aten.view.default", args=(Ref("labels"), (-1,)),
                       outputs=("flat_labels",)))
    last.op("aten.cross_entropy_loss.default", (Ref("flat"), Ref("flat_labels")), "loss", (), saved=("flat",))
    layer = mlp_class(hidden, inner, seq_len)
    blocks = [Block(name="prologue", cls="prologue", inputs=("input_ids",), params=("embed.weight",), buffers=(),
                    outputs=("h0",))]
    blocks += [
        Block(name=f"layers.{i}", cls="layer", inputs=(f"h{i}",), params=(f"layers.{i}.up", f"layers.{i}.down"),
              buffers=(), outputs=(f"h{i + 1}",))
        for i in range(num_layers)
    ]
    blocks.append(Block(name="epilogue", cls="epilogue", inputs=(f"h{num_layers}", "labels"),
                        params=("embed.weight" if tied else "head.weight",), buffers=(), outputs=("loss",)))
    classes = (first.build("x"), layer, last.build("loss"))
    by_name = {cls.name: cls for cls in classes}
    params = {
        name: dataclasses.replace(by_name[block.cls].tensor[local], name=name)
        for block in blocks for local, name in zip(by_name[block.cls].params, block.params, strict=True)
    }
    return ModelGraph(
        name="toy", rows=ROWS, rows_are_tagged=True,
        inputs=(TensorInfo(name="input_ids", shape=(ROWS, seq_len), dtype="int64"),
                TensorInfo(name="labels", shape=(ROWS, seq_len), dtype="int64")),
        params=tuple(params.values()), buffers=(), aliases=(), classes=(*classes, empty_class("shared")),
        blocks=tuple(blocks),
        shared=Block(name="shared", cls="shared", inputs=(), params=(), buffers=(), outputs=()), loss="loss",
    )


def empty_class(name: str) -> BlockClass:
    return BlockClass(name=name, inputs=(), params=(), buffers=(), outputs=(), ops=(), tensors=())


def device(speed: float = 1.0, memory_gib: float = 16.0, host_gb_per_s: float | None = None) -> DeviceType:
    return DeviceType(
        host_bandwidth_bytes_per_s=host_gb_per_s * 1e9 if host_gb_per_s else None,
        name=f"CPU-TOY-{speed:g}-{memory_gib:g}-{host_gb_per_s}", memory_bytes=int(memory_gib * 2**30),
        memory_bandwidth_bytes_per_s=1e12 * speed,
        peak_flops=(("float32", 10e12 * speed), ("bfloat16", 100e12 * speed)), kernel_launch_s=1e-6,
    )


LINK = Link(name="toy link", latency_s=2e-6, bandwidth_bytes_per_s=200e9)
NETWORK = Link(name="toy network", latency_s=5e-6, bandwidth_bytes_per_s=25e9)


def cluster(
    num_nodes: int = 1, per_node: int = 4, speeds: tuple[float, ...] = (), memory_gib: float = 16.0,
    host_gb_per_s: float | None = None,
) -> Cluster:
    """Nodes of toy devices; `speeds` gives the nodes' relative speeds (1 each if left out)."""
    nodes = tuple(
        Node(device=device(speed, memory_gib, host_gb_per_s), num_devices=per_node, link=LINK, network=NETWORK)
        for speed in (speeds or (1.0,) * num_nodes)
    )
    return Cluster(name=f"{len(nodes)}x{per_node}xTOY", nodes=nodes)
