"""The calls that a model's forward makes to its blocks, found by one forward under fake tensors.

The body of a block runs once for each distinct call; later calls with the same key get fresh fake outputs of the
recorded shapes, so that the work does not grow with the number of identical layers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.graph.attribute_reads import watch_reads
from autopar.graph.autocast import AutocastState, autocast_state
from autopar.graph.collected import collected_names, hand_on, taking_collected
from autopar.graph.explain import explained
from autopar.graph.left_behind import LeftBehind
from autopar.graph.module_blocks import AttributeKey, Candidate, comparable

log = logging.getLogger(__name__)
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, kw_only=True)
class TensorMeta:
    """What a fake tensor is made from."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: Tensor) -> TensorMeta:
        return TensorMeta(shape=tuple(tensor.shape), stride=tensor.stride(), dtype=tensor.dtype, device=tensor.device,
                          requires_grad=tensor.requires_grad)

    def make(self) -> Tensor:
        """A new tensor; call it under a fake mode."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.requires_grad)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor among the leaves of a pytree, by its number among the distinct tensors."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Template:
    """A pytree with its tensors taken out."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    def fill(self, tensors: list[Tensor]) -> Any:
        return pytree.tree_unflatten(
            [tensors[leaf.index] if isinstance(leaf, Slot) else leaf for leaf in self.leaves], self.spec)


def take_tensors(tree: Any) -> tuple[Template, list[Tensor], list[str]]:
    """The tree without its tensors, its distinct tensors, and a readable name for each."""
    flat, spec = pytree.tree_flatten_with_path(tree)
    order: dict[int, int] = {}
    tensors: list[Tensor] = []
    names: list[str] = []
    leaves: list[Any] = []
    for path, leaf in flat:
        if isinstance(leaf, Tensor):
            if id(leaf) not in order:
                order[id(leaf)] = len(tensors)
                tensors.append(leaf)
                names.append(".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path))
            leaves.append(Slot(order[id(leaf)]))
        else:
            leaves.append(leaf)
    return Template(leaves=tuple(leaves), spec=spec), tensors, names


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """One call of a block. Calls with equal `key` run the same ops on tensors of the same shapes.

    `result` is of what the block returns and of what hooks inside collect in lists of the names in `collected`.
    """

    candidate: Candidate
    key: Hashable
    arguments: Template  # of (args, kwargs)
    input_names: tuple[str, ...]
    inputs: tuple[TensorMeta, ...]
    outputs: tuple[TensorMeta, ...]
    result: Template
    collected: tuple[str, ...]
    grad_enabled: bool
    autocast: AutocastState

    def answer(self, tensors: list[Tensor]) -> Any:
        """What the block returns, made of its output tensors; what was collected inside goes to the running model."""
        result, collected = self.result.fill(tensors)
        hand_on(collected)
        return result


@dataclass
class Recording:
    """All calls in order, and the first call of each key."""

    calls: list[BlockCall] = field(default_factory=list)
    first: dict[Hashable, BlockCall] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    replaced: dict[str, None] = field(default_factory=dict)  # buffers that the forward assigns
    counted: dict[str, None] = field(default_factory=dict)  # numbers among the modules' attributes that it changes
    kept: dict[str, None] = field(default_factory=dict)  # attributes in which it leaves tensors


@contextlib.contextmanager
def patched_forwards(candidates: list[Candidate], replace: Callable[[Candidate, Any], Any]) -> Iterator[None]:
    """While inside, `replace(candidate, (args, kwargs))` answers for each candidate's forward."""
    try:
        for candidate in candidates:
            def forward(*args: Any, _candidate: Candidate = candidate, **kwargs: Any) -> Any:
                return replace(_candidate, (args, kwargs))
            candidate.module.forward = forward
        yield
    finally:
        for candidate in candidates:
            candidate.module.__dict__.pop("forward", None)


def record(run: Callable[[], Any], model: nn.Module, candidates: tuple[Candidate, ...]) -> Recording:
    """Runs `run` (the model's forward on fake inputs) until what must be told apart is known, and returns the calls.

    Attributes that differ between modules built alike (a layer's index) count only if a forward reads them.
    """
    reads: dict[Hashable, set[AttributeKey]] = {}
    unfolded: dict[str, str] = {}  # FQN -> reason
    while True:
        recorder = _Recorder(candidates, reads, unfolded)
        left_behind = LeftBehind(model, [candidate.module for candidate in recorder.folded])
        with left_behind.removed(), patched_forwards(recorder.folded, recorder.call), explained(model):
            run()
        recorder.recording.replaced |= left_behind.replaced
        recorder.recording.counted |= left_behind.counted
        recorder.recording.kept |= left_behind.kept
        if not recorder.changed:
            break
    patched = [candidate.fqn for candidate in candidates if "forward" in candidate.module.__dict__]
    unfolded |= dict.fromkeys(patched, "its forward was replaced on the instance")
    notes = [f"{fqn}: not folded, {reason}" for fqn, reason in unfolded.items()]
    if counted := recorder.recording.counted:
        notes.append(f"the forward changes the number {', '.join(counted)}, and each step has the value of the first: "
                     "pass what changes in the batch, as a tensor, or keep it in a buffer")
    recorder.recording.notes.extend(notes)
    return recorder.recording


class _Recorder:
    def __init__(self, candidates: tuple[Candidate, ...], reads: dict[Hashable, set[AttributeKey]],
                 unfolded: dict[str, str]):
        self.reads, self.unfolded = reads, unfolded
        self.folded = [candidate for candidate in candidates
                       if candidate.fqn not in unfolded and "forward" not in candidate.module.__dict__]
        self.own = {candidate.fqn: _given_tensors(candidate.module) for candidate in self.folded}
        self.recording = Recording()
        self.changed = False
        self.is_inside = False  # of a block: one that is called there belongs to it

    def call(self, candidate: Candidate, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        if self.is_inside:
            return type(candidate.module).forward(candidate.module, *arguments[0], **arguments[1])
        if _given_tensors(candidate.module) != self.own[candidate.fqn]:
            return self._leave_unfolded(candidate, arguments, "its weights or other tensors are set from outside")
        template, tensors, names = take_tensors(arguments)
        if opaque := [leaf for leaf in template.leaves if not _is_plain(leaf)]:
            return self._leave_unfolded(candidate, arguments, f"it takes a {type(opaque[0]).__name__}")
        read = self.reads.setdefault(candidate.structure, set())
        key = (
            candidate.structure, tuple(sorted((name, candidate.attributes[name]) for name in read)),
            tuple(leaf if isinstance(leaf, Slot) else comparable(leaf) for leaf in template.leaves),
            str(template.spec), tuple(TensorMeta.of(tensor) for tensor in tensors), torch.is_grad_enabled(),
            autocast_state(), collected_names(),
        )
        known = self.recording.first.get(key)
        if known is None:
            left_behind = LeftBehind(candidate.module, name=candidate.fqn)
            watch = watch_reads(candidate.module, candidate.attributes)
            with left_behind.removed(), watch as seen, taking_collected() as collected:
                self.is_inside = True
                try:
                    result = type(candidate.module).forward(candidate.module, *arguments[0], **arguments[1])
                finally:
                    self.is_inside = False
            self.recording.replaced |= left_behind.replaced
            self.recording.counted |= left_behind.counted
            self.recording.kept |= left_behind.kept
            if not seen <= read:
                read |= seen
                self.changed = True
            out_template, out_tensors, _ = take_tensors((result, collected))
            if opaque := [leaf for leaf in out_template.leaves if not _is_plain(leaf)]:
                return self._leave_unfolded(candidate, arguments, f"it returns a {type(opaque[0]).__name__}")
            known = BlockCall(
                candidate=candidate, key=key, arguments=template, input_names=_input_names(candidate.module, names),
                inputs=tuple(TensorMeta.of(tensor) for tensor in tensors),
                outputs=tuple(TensorMeta.of(tensor) for tensor in out_tensors), result=out_template,
                collected=tuple(collected), grad_enabled=torch.is_grad_enabled(), autocast=autocast_state(),
            )
            self.recording.first[key] = known
        self.recording.calls.append(replace(known, candidate=candidate))
        return known.answer([meta.make().clone() for meta in known.outputs])

    def _leave_unfolded(self, candidate: Candidate, arguments: Any, reason: str) -> Any:
        self.unfolded[candidate.fqn] = reason
        self.changed = True
        return type(candidate.module).forward(candidate.module, *arguments[0], **arguments[1])


def _given_tensors(module: nn.Module) -> tuple[tuple[str, int], ...]:
    """Which tensors are the module's parameters and plain attributes.

    Code outside of a block may put others in their place: torch.func.functional_call, a hook that makes the weight, a
    model that hands its layers a mask.
    """
    found = [(name, id(param)) for name, param in module.named_parameters(remove_duplicate=False)]
    for path, inner in module.named_modules():
        found += [(f"{path}:{name}", id(value)) for name, value in inner.__dict__.items() if isinstance(value, Tensor)]
    return tuple(found)


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, (Slot, *_PLAIN)) or comparable(leaf)[0] != "object"  # type: ignore[index]


def _input_names(module: nn.Module, names: list[str]) -> tuple[str, ...]:
    """Readable names of a block's tensor inputs: those of its forward's parameters."""
    code = getattr(getattr(type(module).forward, "__wrapped__", type(module).forward), "__code__", None)
    parameters = code.co_varnames[1:code.co_argcount] if code is not None else ()
    result = []
    for name in names:
        kind, _, rest = name.partition(".")
        first, dot, tail = rest.partition(".")
        if kind == "0" and first.isdigit() and int(first) < len(parameters):
            result.append(parameters[int(first)] + dot + tail)
        else:
            result.append(f"args.{rest}" if kind == "0" else rest)
    return tuple(result)
