"""Capture: a model and an example batch become a ModelGraph, without touching or copying a weight."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.parameter import is_lazy

from autopar.errors import CaptureError, InputError
from autopar.graph.assemble import BlockProgram, BoundBlock, assemble, build_class, leaf_bindings
from autopar.graph.autocast import AutocastState, autocast_as, autocast_state, without_autocast
from autopar.graph.carried import check_carries_nothing
from autopar.graph.distributions import unchecked_distributions
from autopar.graph.fake import fake_like, faked, masks_as_given, new_fake_mode, outside_other_modes, traced_under
from autopar.graph.fuse import fused_class
from autopar.graph.hugging_face import traceable
from autopar.graph.lift import Leaf, lift
from autopar.graph.model_call import any_keywords, model_output, perhaps_label
from autopar.graph.model_graph import DTYPE_BYTES, BlockClass, ModelGraph, Op, TensorInfo
from autopar.graph.module_blocks import find_candidates
from autopar.graph.own_evaluation import lines_of_one_mode
from autopar.graph.own_gradients import hooked_gradients, noting_own_gradients
from autopar.graph.python_random import refusing_python_draws
from autopar.graph.record import BlockCall, Recording, record
from autopar.graph.trace import trace_block, trace_outer

log = logging.getLogger(__name__)
LossFn = Callable[[Any, Any], Tensor]
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph and the values that its ops need besides batch and parameters.

    `constants` maps each name of `graph.buffers` to its tensor: the model's own buffers, and the constants that the
    forward made (`_constants.N`). `own_gradients` says, in words, what of the gradients is code of the model's own,
    which the graph does not hold (`autopar.graph.own_gradients`). `own_evaluation` are the lines of the model's code
    that compute in training alone, or in evaluation alone, if that was asked for (`autopar.graph.own_evaluation`).
    `autocast` is what was on around the capture, whose casts the graph has.
    """

    graph: ModelGraph
    constants: dict[str, Tensor]
    own_gradients: tuple[str, ...] = ()
    own_evaluation: tuple[str, ...] = ()
    autocast: AutocastState = ()


def capture(model: nn.Module, example_batch: Mapping[str, Any] | tuple[Any, ...], *, loss_fn: LossFn | None = None,
            tag_rows: bool = False, name: str = "", dtype: str | None = None, fuse: bool = False,
            evaluates: bool = False) -> Captured:
    """The ModelGraph of one training forward of `model` on `example_batch`, with its loss.

    `example_batch` is a dict of keyword arguments or a tuple of positional ones. The loss is `loss_fn(output, batch)`
    if given (the batch may then hold what only this function reads), else the model's scalar output or its `.loss`.
    Model and batch may be real, fake or on the meta device; the model is left as it was. `tag_rows` replaces the batch
    size by a prime that divides no other size, so that the graph can be scaled to any number of rows. `dtype`
    ("bfloat16") captures the model as if its floating-point parameters and inputs were of that dtype, as mixed
    precision runs it (buffers keep theirs); casts of torch.autocast, inside the model or around the call, are ops of
    the graph. `fuse` makes one op of each chain of elementwise ops that one kernel does
    (`autopar.graph.fuse`). `evaluates` finds what of the model's code evaluation would need besides the graph.
    Raises CaptureError with the module and line that cannot be captured.
    """
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise InputError(f"unknown dtype {dtype!r}")
    float_dtype: torch.dtype | None = getattr(torch, dtype) if dtype is not None else None
    surrounding = autocast_state()
    batch = _Batch(example_batch)
    with outside_other_modes(), without_autocast(), _perhaps_label_told(model, batch, loss_fn):
        return _capture(model, batch, loss_fn, tag_rows, name or type(model).__name__, float_dtype, fuse, evaluates,
                        surrounding)


def _capture(model: nn.Module, batch: _Batch, loss_fn: LossFn | None, tag_rows: bool, name: str,
             float_dtype: torch.dtype | None, fuse: bool, evaluates: bool,
             surrounding: AutocastState) -> Captured:
    check_model(model)
    mode = new_fake_mode()
    rows = _prime(model, batch) if tag_rows else batch.rows
    build = _Builder(model, mode)
    own_gradients = dict.fromkeys(hooked_gradients(model))
    own_evaluation: tuple[str, ...] = ()
    with traceable(model, float_dtype) as notes, masks_as_given(), unchecked_distributions():
        candidates = find_candidates(model)
        with faked(model, mode, float_dtype):
            fakes = batch.fakes(mode, rows, float_dtype)
            params = tuple(_info(fqn, param) for fqn, param in model.named_parameters())

            def loss(*tensors: Tensor) -> Tensor:
                with autocast_as(surrounding):
                    return _loss(model, batch.fill(list(tensors)), loss_fn)

            with (traced_under(mode), refusing_python_draws(type(model).__name__),
                  noting_own_gradients(own_gradients)):
                recording = record(
                    lambda: _check_trains(model, loss(*fakes), own_gradients), model, candidates)
                if recording.kept:
                    check_carries_nothing(model, lambda: loss(*fakes), fakes)
            if evaluates:
                with traced_under(mode):
                    own_evaluation = lines_of_one_mode(model, lambda: record(lambda: loss(*fakes), model, candidates))
            outer = trace_outer(model, loss, fakes, recording)
            programs = {key: build.program(call) for key, call in recording.first.items()}
            lifted = lift(outer.program, build.leaves(outer.program, list(batch.names)), mode, calls=recording.calls,
                          stretches=outer.stretches)
    programs = build.merged(programs)
    chain = assemble(lifted, build.bind(recording, programs))
    notes = [*notes, *recording.notes, *_fold_notes(recording, programs), *batch.notes(rows)]
    if loss_fn is not None and (unnamed := any_keywords(model, batch.names)):
        notes.append(f"the model takes any keyword, and so {', '.join(map(repr, unnamed))} of the batch too")
    if recording.counted:
        log.warning("%s: %s", name, next(note for note in recording.notes if next(iter(recording.counted)) in note))
    graph = ModelGraph(
        name=name, rows=rows, rows_are_tagged=tag_rows,
        inputs=tuple(_info(key, fake) for key, fake in zip(batch.names, fakes, strict=True)),
        params=params,
        buffers=(), aliases=build.aliases,
        classes=tuple(map(fused_class, chain.classes)) if fuse else chain.classes,
        blocks=chain.blocks, shared=chain.shared,
        loss=chain.loss, settings=batch.settings, notes=tuple(notes),
    )
    return replace(_finish(graph, build.constant_values, recording.replaced), own_gradients=tuple(own_gradients),
                   own_evaluation=own_evaluation, autocast=surrounding)


@contextlib.contextmanager
def _perhaps_label_told(model: nn.Module, batch: _Batch, loss_fn: LossFn | None) -> Iterator[None]:
    """Adds to a CaptureError which of the model's parameters got what a tuple may have meant for the loss function."""
    try:
        yield
    except CaptureError as error:
        name = perhaps_label(model, batch.values()) if loss_fn is not None and not batch.is_mapping else None
        if name is None:
            raise
        raise CaptureError(f"{error}; the batch is a tuple, and the model's {name!r} got a part of it: give a dict if "
                           "that was meant for loss_fn") from error


def check_model(model: nn.Module) -> None:
    """InputError for what is no model by itself, or has no shapes yet."""
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}, and no torch.nn.Module")
    inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module" if isinstance(model, _WRAPPERS) else ""
    if inner:
        raise InputError(f"{type(model).__name__} wraps the model: give what it wraps, model.{inner}")
    for name, param in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(param):
            raise InputError(f"{name} has no shape before the model's first call: call it once on a batch")


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."),
                      requires_grad=tensor.requires_grad)


def _finish(graph: ModelGraph, values: dict[str, Tensor], replaced: Iterable[str]) -> Captured:
    """Adds the buffers that are used, and a note about parameters that are not.

    CaptureError for a buffer that is used and then `replaced`: a next step would have to use the new one.
    """
    blocks = (graph.shared, *graph.blocks)
    used = dict.fromkeys(name for block in blocks for name in block.buffers)
    if stale := next((name for name in replaced if name in used), None):
        own = stale.rpartition(".")[2]
        raise CaptureError(f"{graph.name}: the forward reads its buffer {stale} and assigns another to it; write into "
                           f"it (self.{own}.copy_(...)), so that the next step reads what this one wrote")
    read = {name for block in blocks for name in block.params}
    unread = [info.name for info in graph.params if info.name not in read]
    notes = graph.notes
    if unread:
        shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        notes = (*notes, f"{len(unread)} parameters do not reach the loss: {shown}")
    buffers = tuple(_info(name, values[name]) for name in used)
    if graph.rows_are_tagged:
        _check_constants(graph, buffers)
    return Captured(graph=replace(graph, buffers=buffers, notes=notes), constants={name: values[name] for name in used})


def _check_constants(graph: ModelGraph, buffers: Iterable[TensorInfo]) -> None:
    """CaptureError for a constant with the batch's rows: it could not follow another number of them."""
    made = {info.name for info in buffers if info.name.startswith("_constants.") and graph.rows in info.shape}
    for block in (graph.shared, *graph.blocks):
        cls = graph.block_class[block.cls]
        local = {name for name, known in zip(cls.buffers, block.buffers, strict=True) if known in made}
        reader = next((op for op in cls.ops if not local.isdisjoint(op.operands)), None)
        if reader is not None:
            place = f" ({reader.source})" if reader.source else ""
            raise CaptureError(f"{graph.name}: {block.name}{place} reads a tensor that the forward makes of Python or "
                               "numpy values, with a row for each of the batch's; make it with torch, or pass it in "
                               "the batch")


class _Batch:
    """The example batch: its tensors by name, and how to put others in their place."""

    def __init__(self, example: Mapping[str, Any] | tuple[Any, ...]):
        if isinstance(example, Mapping):
            items = [(str(key), value) for key, value in example.items()]
        elif isinstance(example, (tuple, list)):
            items = [(str(index), value) for index, value in enumerate(example)]
        else:
            raise InputError(f"example_batch must be a dict of tensors or a tuple, not a {type(example).__name__}")
        self.is_mapping = isinstance(example, Mapping)
        self.items = items
        for key, value in items:
            if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
                raise InputError(f"example_batch[{key!r}] is a {type(value).__name__}; give tensors")
        self.tensors = {key: value for key, value in items if isinstance(value, Tensor)}
        self.names = tuple(self.tensors)
        self.settings = tuple((key, repr(value)) for key, value in items if not isinstance(value, Tensor))
        sizes = Counter(tensor.shape[0] for tensor in self.tensors.values() if tensor.dim() > 0)
        if not sizes:
            raise InputError("example_batch has no tensor with a batch dim")
        self.rows = next(tensor.shape[0] for tensor in self.tensors.values()
                         if tensor.dim() > 0 and sizes[tensor.shape[0]] == max(sizes.values()))
        if not self.rows:
            raise InputError("example_batch has 0 rows; give at least one")

    def fakes(self, mode: FakeTensorMode, rows: int, float_dtype: torch.dtype | None) -> list[Tensor]:
        """One distinct fake tensor for each batch tensor, with `rows` rows."""
        return [fake_like(mode, tensor, (rows, *tensor.shape[1:]) if self._has_rows(tensor) else None, float_dtype)
                for tensor in self.tensors.values()]

    def _has_rows(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.rows

    def fill(self, tensors: list[Tensor]) -> Any:
        given = dict(zip(self.names, tensors, strict=True))
        values = [given.get(key, value) for key, value in self.items]
        return dict(zip((key for key, _ in self.items), values, strict=True)) if self.is_mapping else tuple(values)

    def values(self) -> tuple[Any, ...]:
        return tuple(value for _, value in self.items)

    def notes(self, rows: int) -> list[str]:
        return [f"batch tensor {key!r} of shape {tuple(tensor.shape)} has no batch dim of {self.rows} rows"
                for key, tensor in self.tensors.items() if not self._has_rows(tensor)]


def _prime(model: nn.Module, batch: _Batch) -> int:
    """The smallest prime from 1009 on that divides no size near a dim of the model or batch, or near 2-4 times it."""
    dims = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    dims |= {size for tensor in batch.tensors.values() for size in tensor.shape}
    avoid = {size * times + near for size in dims for times in (1, 2, 3, 4) for near in range(-2, 3)} - {0}
    candidate = 1009
    while any(candidate % d == 0 for d in range(2, 200) if d * d <= candidate) or any(
            size % candidate == 0 for size in avoid):
        candidate += 2
    return candidate


def _loss(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    loss: Any
    output = model_output(model, batch, has_loss_fn=loss_fn is not None)
    if loss_fn is not None:
        if str(getattr(loss_fn, "__module__", "")).startswith("torch.nn."):
            called = getattr(loss_fn, "__name__", f"{type(loss_fn).__name__}()")
            raise InputError(f"loss_fn gets the model's output and the batch, and {called} wants a target: give for "
                             f"example lambda output, batch: {called}(output, batch['labels'])")
        loss = loss_fn(output, batch)
    elif isinstance(output, Tensor):
        loss = output
    else:
        loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(output).__name__}"
        found = _scalar_at(output)
        like = f", as lambda output, batch: output[{found!r}]" if found is not None and loss_fn is None else ""
        raise CaptureError(f"{type(model).__name__}: the model returns {what} and no scalar loss; "
                           f"put labels into the batch or give loss_fn(output, batch){like}")
    return loss if loss.dim() == 0 else loss.reshape(())


def _scalar_at(output: Any) -> Any:
    """Where in a tuple or dict the one tensor of a single element lies; None if there is no such."""
    items = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    found = [key for key, value in items if isinstance(value, Tensor) and value.numel() == 1]
    return found[0] if len(found) == 1 else None


def _check_trains(model: nn.Module, loss: Tensor, own_gradients: Iterable[str]) -> None:
    if not loss.requires_grad:
        causes = ", ".join(("detach(), no_grad, frozen parameters, or a model without any", *own_gradients))
        raise CaptureError(f"{type(model).__name__}: the loss has no gradient to any parameter, so that nothing can be "
                           f"trained; look for {causes}")


class _Builder:
    """Turns recorded calls into block programs and keeps the global names."""

    def __init__(self, model: nn.Module, mode: FakeTensorMode):
        self.mode = mode
        first = {id(param): name for name, param in model.named_parameters()}
        first |= {id(buffer): name for name, buffer in model.named_buffers()}
        self.canonical: dict[str, str] = {}
        for name, tensor in (*model.named_parameters(remove_duplicate=False),
                             *model.named_buffers(remove_duplicate=False)):
            self.canonical[name] = first[id(tensor)]
        self.trainable = {name for name, param in model.named_parameters() if param.requires_grad}
        params = dict(model.named_parameters())
        self.aliases = tuple((name, known) for name, known in self.canonical.items()
                             if name != known and known in params)
        self.constant_values: dict[str, Tensor] = dict(model.named_buffers())

    def leaves(self, program: ExportedProgram, inputs: list[str], fqn: str = "",
               grads: tuple[bool, ...] = ()) -> list[Leaf]:
        """What each placeholder of an exported program stands for; names are relative to the block at `fqn`."""
        found: list[Leaf] = []
        count = 0
        for spec in program.graph_signature.input_specs:
            target = (spec.target or "").removeprefix("model.")
            full = f"{fqn}.{target}" if fqn else target
            if spec.kind is InputKind.PARAMETER or spec.kind is InputKind.BUFFER:
                full = self.canonical[full]
                kind = "param" if spec.kind is InputKind.PARAMETER else "buffer"
                found.append(Leaf(kind=kind, name=target if fqn else full, requires_grad=full in self.trainable))
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                name = f"_constants.{sum(key.startswith('_constants.') for key in self.constant_values)}"
                self.constant_values[name] = program.constants[spec.target or ""]
                found.append(Leaf(kind="constant", name=name))
            elif spec.kind is InputKind.USER_INPUT:
                found.append(Leaf(kind="input", name=inputs[count], requires_grad=bool(grads) and grads[count]))
                count += 1
            else:
                raise CaptureError(f"{fqn or 'the model'}: it holds a {spec.kind.name.lower()}, "
                                   "which cannot be captured")
        return found

    def program(self, call: BlockCall) -> BlockProgram:
        """The class of one recorded call."""
        fqn = call.candidate.fqn
        exported = trace_block(call, self.mode)
        positions = [f"%input.{index}" for index in range(len(call.inputs))]
        leaves = self.leaves(exported, positions, fqn, tuple(meta.requires_grad for meta in call.inputs))
        lifted = lift(exported, leaves, self.mode, where=fqn)
        bindings = leaf_bindings(lifted.leaves)
        taken = {name for kind, name in bindings.values() if kind != "input"}
        for old, (kind, local) in bindings.items():
            if kind == "input":
                readable = call.input_names[positions.index(local)]
                while readable in taken:
                    readable = f"input_{readable}"
                taken.add(readable)
                bindings[old] = (kind, readable)
        ops = [op for op in lifted.items if isinstance(op, Op)]
        cls, names = build_class(type(call.candidate.module).__name__, ops, bindings, lifted.info, lifted.outputs)
        used = tuple(positions.index(lifted.leaves[old].name) for old, (kind, _) in bindings.items()
                     if kind == "input" and old in names)
        return BlockProgram(cls=cls, used_inputs=used)

    def merged(self, programs: dict[Any, BlockProgram]) -> dict[Any, BlockProgram]:
        """The programs with one class, of a name of its own, for those that came out equal."""
        known: dict[BlockClass, str] = {}
        numbers: Counter[str] = Counter()
        result: dict[Any, BlockProgram] = {}
        for key, program in programs.items():
            base = program.cls.name
            if program.cls not in known:
                known[program.cls] = f"{base}.{numbers[base]}" if numbers[base] else base
                numbers[base] += 1
            result[key] = replace(program, cls=replace(program.cls, name=known[program.cls]))
        return result

    def bind(self, recording: Recording, programs: dict[Any, BlockProgram]) -> list[BoundBlock]:
        """Each recorded call with its block's name and the global names of its parameters and buffers."""
        seen: Counter[str] = Counter()
        bound: list[BoundBlock] = []
        for call in recording.calls:
            fqn = call.candidate.fqn
            seen[fqn] += 1
            program = programs[call.key]

            def globals_of(names: tuple[str, ...], fqn: str = fqn) -> tuple[str, ...]:
                return tuple(name if name.startswith("_constants.") else self.canonical[f"{fqn}.{name}"]
                             for name in names)

            bound.append(BoundBlock(name=fqn if seen[fqn] == 1 else f"{fqn}@{seen[fqn]}", program=program,
                                    params=globals_of(program.cls.params), buffers=globals_of(program.cls.buffers)))
        return bound


def _fold_notes(recording: Recording, programs: dict[Any, BlockProgram]) -> list[str]:
    """Which modules are built alike and yet run different ops."""
    classes: dict[Any, dict[str, list[str]]] = {}
    for call in recording.calls:
        names = classes.setdefault(call.candidate.structure, {})
        names.setdefault(programs[call.key].cls.name, []).append(call.candidate.fqn)
    notes = []
    for names in classes.values():
        if len(names) > 1:
            parts = ", ".join(f"{len(members)} as {members[0]}" for members in names.values())
            notes.append(f"modules built alike run {len(names)} different programs: {parts}")
    return notes


