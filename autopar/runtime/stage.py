"""Makes the module of a pipeline stage, with its parameters under the model's own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from autopar.errors import InputError
from autopar.graph.model_graph import Block, ModelGraph, Op
from autopar.plan.plan import Plan, Recompute, Stage, Variant, is_layer
from autopar.runtime.collectives import Axis, Fn, converter
from autopar.runtime.evaluation import evaluated
from autopar.runtime.layout import Layout, local_part
from autopar.runtime.loss import LossTerms
from autopar.runtime.lower import LoweredClass, lower_class, run_ops
from autopar.runtime.offload import Offloader
from autopar.runtime.stage_module import BlockModule, ExpertsModule, StageModule
from autopar.sharding.joint import Placement
from autopar.sharding.rows import at_other_rows
from autopar.sharding.state import RP, State
from autopar.sharding.strategy import ClassSharding
from autopar.simulate.attention_core import attention_cores


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor called `path`, made where it is missing, and the tensor's name in it."""
    *parents, name = path.split(".")
    module = root
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        child = module._modules[parent]
        assert child is not None
        module = child
    return module, name


def _experts_module(root: nn.Module, path: str) -> None:
    """Make the module that holds this parameter one of experts."""
    where = path.rpartition(".")[0]
    owner, name = _owner(root, where)
    found = owner._modules.get(name)
    if not isinstance(found, ExpertsModule):
        if not where or found is not None:
            raise InputError(f"{path} is in a module of other things, which ep cannot share out; plan with ep 1")
        owner.add_module(name, ExpertsModule())


class StageBuilder:
    """Makes the modules of a rank's stages; programs are made once a class and shared by all of them."""

    def __init__(
        self, graph: ModelGraph, tagged: ModelGraph, plan: Plan, layout: Layout, terms: LossTerms,
        axes: tuple[Axis, ...], device: torch.device, expert_axis: Axis | None = None,
    ) -> None:
        """`graph` is at this rank's rows; `tagged` is the same model as it was captured."""
        self.expert_axis = expert_axis
        self.graph, self.tagged, self.plan, self.layout, self.terms = graph, tagged, plan, layout, terms
        self.axes, self.device = axes, device
        self.programs: dict[tuple[str, bool, bool, tuple[ClassSharding, ...]], LoweredClass] = {}

    def _shardings(self, name: str, stage: Stage) -> tuple[ClassSharding, ...]:
        """A class's choices in a stage, at this rank's rows."""
        choices = self.plan.class_shardings(name, stage)
        return at_other_rows(choices, self.tagged, self.plan.micro_batch, self.graph.rows)

    def program(
        self, name: str, stage: Stage, *, selective: bool = False, evaluation: bool = False
    ) -> LoweredClass:
        """The program of a class in a stage, compiled by torch.compile where the plan says so.

        `selective`: one whose attention cores are computed again in the backward. `evaluation`: that of a forward
        alone, of a model in evaluation.
        """
        cls = self.graph.block_class[name]
        terms = dict(self.terms.terms) if cls is self.terms.cls else {}
        if evaluation:
            cls = evaluated(cls)
            evaluation, selective = cls is not self.graph.block_class[name], False
        key = (name, selective, evaluation, stage.shardings)
        if key not in self.programs:
            cores = attention_cores(cls) if selective else ()
            lowered = lower_class(
                cls, self._shardings(name, stage), self.axes, self.device, terms, cores, self.expert_axis
            )
            if self.plan.compile:
                lowered = replace(lowered, code=torch.compile(lowered.code), uncompiled=lowered.code)
            self.programs[key] = lowered
        return self.programs[key]

    def stage(
        self, index: int, params: Mapping[str, nn.Parameter], constants: Mapping[str, Tensor],
        persistent: frozenset[str],
    ) -> StageModule:
        """The module of a stage, with this rank's parts of the parameters by name.

        `constants` holds the graph's buffers; those in `persistent` appear in the state dict under their names.
        """
        module = StageModule()
        stage = self.plan.stages[index]
        blocks = self.graph.blocks[stage.first : stage.last]
        for block in blocks:
            made = BlockModule()
            if block.name in self.layout.units:
                owner, name = _owner(module, block.name)
                owner.add_module(name, made)
            else:
                module._autopar_free.append(made)
            module._autopar_chain.append((block, made))
        for param in self.layout.of_stage(index):
            for path in param.names:
                if param.by_experts:
                    _experts_module(module, path)
                owner, name = _owner(module, path)
                owner.register_parameter(name, params[param.name])
        buffers = self._add_buffers(module, blocks, constants, persistent)
        stored = {param.name: param.state for param in self.layout.of_stage(index)}
        variants = iter(stage.layer_variants(sum(is_layer(block.name) for block in blocks)))
        offloader = module._autopar_offloader = Offloader(self.device) if stage.num_offloaded else None
        for block, made in module._autopar_chain:
            variant = next(variants) if is_layer(block.name) else Variant()
            shardings = self._shardings(block.cls, stage)
            places = [
                (*_owner(module, name), self._from_storage(name, stored, tuple(own.params[i] for own in shardings)))
                for i, name in enumerate(block.params)
            ]
            held = [buffers[name] for name in block.buffers]
            for own, axis in zip(shardings, self.axes, strict=True):
                held = [local_part(value, state, axis) for value, state in zip(held, own.buffers, strict=True)]
            selective = variant.recompute is Recompute.SELECTIVE
            made.bind(
                self.program(block.cls, stage, selective=selective),
                self.program(block.cls, stage, selective=selective, evaluation=True), places, held,
                variant=variant, offloader=offloader,
            )
        module._autopar_shared = self._shared(blocks, buffers)
        sent = self.graph.boundary(stage.last)
        produced = {name for block in blocks for name in block.outputs}
        leaving = tuple(name for name in sent if name in produced)
        module._autopar_leaving = (*leaving, *((self.graph.loss,) if self.graph.loss in produced else ()))
        module._autopar_dead = _last_uses(blocks, frozenset(module._autopar_leaving))
        return module

    def _from_storage(self, name: str, at_rest: Mapping[str, State], wanted: Placement) -> Fn | None:
        """The way of a parameter from its place at rest: as stored on the tensor axis, RP on every other."""
        found = []
        for state, axis in zip(wanted, self.axes, strict=True):
            stored = at_rest[name] if axis.name == "tp" else RP
            convert = converter(stored, state, axis, differentiable=self.graph.param[name].requires_grad)
            if convert is not None:
                found.append(convert)
        if len(found) < 2:
            return found[0] if found else None
        return partial(_one_after_another, tuple(found))

    def _add_buffers(
        self, module: StageModule, blocks: Sequence[Block], constants: Mapping[str, Tensor],
        persistent: frozenset[str],
    ) -> dict[str, Tensor]:
        wanted = {name for block in (*blocks, self.graph.shared) for name in block.buffers}
        buffers = {name: constants[name].clone() for name in sorted(wanted)}
        for name, value in buffers.items():
            if name in persistent:
                owner, attribute = _owner(module, name)
                owner.register_buffer(attribute, value)
        return buffers

    def _shared(
        self, blocks: Sequence[Block], buffers: Mapping[str, Tensor]
    ) -> tuple[tuple[str, ...], tuple[str, ...], LoweredClass, list[Tensor]] | None:
        """The part of `graph.shared` that the blocks need."""
        shared = self.graph.shared
        needed = {name for block in blocks for name in block.inputs}
        cls = self.graph.block_class[shared.cls]
        kept = [i for i, name in enumerate(shared.outputs) if name in needed]
        if not kept:
            return None
        outputs = tuple(cls.outputs[i] for i in kept)
        ops, wanted = needed_ops(cls.ops, outputs)
        inputs = tuple(name for name in cls.inputs if name in wanted)
        held = tuple(name for name in cls.buffers if name in wanted)
        part = replace(cls, ops=ops, outputs=outputs, inputs=inputs, buffers=held, params=())
        program = lower_class(part, None, None, self.device)
        name_of = dict(zip((*cls.inputs, *cls.buffers), (*shared.inputs, *shared.buffers), strict=True))
        return (
            tuple(name_of[name] for name in inputs), tuple(shared.outputs[i] for i in kept), program,
            [buffers[name_of[name]] for name in held],
        )

    def run_ops(self, ops: tuple[Op, ...], values: dict[str, Tensor]) -> None:
        run_ops(ops, values, self.device)


def _one_after_another(functions: Sequence[Fn], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


def needed_ops(ops: Sequence[Op], outputs: Sequence[str]) -> tuple[tuple[Op, ...], frozenset[str]]:
    """The ops that these tensors need, in order, and every tensor that those ops touch."""
    wanted = set(outputs)
    kept = []
    for op in reversed(ops):
        if wanted.intersection(op.outputs):
            kept.append(op)
            wanted.update(op.operands)
    return tuple(reversed(kept)), frozenset(wanted)


def _last_uses(blocks: Sequence[Block], leaving: frozenset[str]) -> list[tuple[str, ...]]:
    """For each block, what no later block needs."""
    seen: set[str] = set(leaving)
    dead = []
    for block in reversed(blocks):
        names = tuple(name for name in dict.fromkeys((*block.inputs, *block.outputs)) if name not in seen)
        seen.update(names)
        dead.append(names)
    return dead[::-1]
