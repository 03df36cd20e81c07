"""Which modules of a model are the blocks of its chain, and which of them are built alike."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from autopar.graph.fake import is_fake

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MAX_HASHED_NUMEL = 1 << 22
AttributeKey = tuple[str, str]  # (path of the submodule inside the block, name of the attribute)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A module that becomes a block each time it is called. Candidates with equal `structure` may be identical.

    `attributes` has the values, made comparable, of those non-tensor attributes that differ inside the group.
    """

    fqn: str
    module: nn.Module
    structure: Hashable
    attributes: dict[AttributeKey, Hashable]


def find_candidates(model: nn.Module) -> tuple[Candidate, ...]:
    """The block candidates of a model, in the order of its module hierarchy; none contains another.

    In a container (ModuleList, Sequential, ModuleDict) whose elements repeat, each element is a block, and each module
    in an element that is a list; elsewhere the search goes on inside, and an element without containers of its own is a
    block. A model without any container has its children as blocks.
    """
    found: list[tuple[str, nn.Module]] = []
    if isinstance(model, _CONTAINERS):
        _search_container("", model, found)
    else:
        _search(model, "", found)
    if not found:
        found = _children_as_blocks("", model)
    unique: dict[int, tuple[str, nn.Module]] = {}
    for fqn, module in found:
        unique.setdefault(id(module), (fqn, module))
    return _with_differences(tuple(unique.values()))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _search(module: nn.Module, prefix: str, found: list[tuple[str, nn.Module]]) -> None:
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            _search_container(_join(prefix, name), child, found)
        else:
            _search(child, _join(prefix, name), found)


def _search_container(prefix: str, container: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
    elements = [(_join(prefix, name), child) for name, child in container.named_children() if _has_parameters(child)]
    structures = [structure_of(child) for _, child in elements]
    if len(set(structures)) < len(structures):
        found.extend(called for fqn, element in elements for called in _called(fqn, element))
        return
    for fqn, element in elements:
        inside: list[tuple[str, nn.Module]] = []
        if isinstance(element, _CONTAINERS):
            _search_container(fqn, element, inside)
        else:
            _search(element, fqn, inside)
        found.extend(inside or [(fqn, element)])


def _called(fqn: str, element: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """An element of a container; of a list or dict, which is never called itself, the modules in it."""
    if not isinstance(element, (nn.ModuleList, nn.ModuleDict)):
        yield fqn, element
        return
    for name, child in element.named_children():
        if _has_parameters(child):
            yield from _called(_join(fqn, name), child)


def _children_as_blocks(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    children = [(_join(prefix, name), child) for name, child in module.named_children() if _has_parameters(child)]
    if len(children) == 1 and next(module.parameters(recurse=False), None) is None:
        return _children_as_blocks(*children[0]) or children
    return children


def structure_of(module: nn.Module) -> Hashable:
    """What two modules must share to be built alike: classes, hooks, and parameters and buffers with their sharing."""
    order: dict[int, int] = {}
    parts: list[Hashable] = []
    for path, child in module.named_modules(remove_duplicate=False):
        tensors: list[Hashable] = []
        for table in (child._parameters, child._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    tensors.append((name, None))
                else:
                    index = order.setdefault(id(tensor), len(order))
                    tensors.append((name, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device,
                                    tensor.requires_grad, isinstance(tensor, nn.Parameter), index))
        hooks = tuple(tuple(id(hook) for hook in getattr(child, kind).values()) for kind in _HOOKS)
        parts.append((path, type(child), tuple(tensors), hooks))
    return tuple(parts)


def _with_differences(found: Iterable[tuple[str, nn.Module]]) -> tuple[Candidate, ...]:
    groups: dict[Hashable, list[tuple[str, nn.Module, dict[AttributeKey, Hashable]]]] = {}
    order: list[tuple[str, Hashable]] = []
    for fqn, module in found:
        structure = structure_of(module)
        order.append((fqn, structure))
        groups.setdefault(structure, []).append((fqn, module, _attributes(module)))
    result: dict[str, Candidate] = {}
    for structure, members in groups.items():
        keys = dict.fromkeys(key for _, _, attributes in members for key in attributes)
        missing = object()
        differing = [key for key in keys if len({attributes.get(key, missing) for _, _, attributes in members}) > 1]
        for fqn, module, attributes in members:
            values = {key: attributes.get(key, ("missing",)) for key in differing}
            result[fqn] = Candidate(fqn=fqn, module=module, structure=structure, attributes=values)
    return tuple(result[fqn] for fqn, _ in order)


def _attributes(module: nn.Module) -> dict[AttributeKey, Hashable]:
    found: dict[AttributeKey, Hashable] = {}
    for path, child in module.named_modules():
        for name, value in child.__dict__.items():
            if name not in _OWN_ATTRIBUTES:
                found[path, name] = comparable(value)
    return found


def comparable(value: object) -> Hashable:
    """A hashable stand-in that is equal for equal values; objects of unknown classes are equal only to themselves."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, enum.Enum)):
        return type(value).__name__, value
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return type(value).__name__, str(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(comparable(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, frozenset(comparable(item) for item in value)
    if isinstance(value, dict):
        return type(value).__name__, tuple((comparable(key), comparable(item)) for key, item in value.items())
    if isinstance(value, Tensor) and _is_small_and_real(value):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return "tensor", tuple(value.shape), str(value.dtype), hashlib.sha256(data).hexdigest()
    if isinstance(value, partial):  # many activations are one, made anew for each layer
        return "object", "partial", comparable(value.func), comparable(value.args), comparable(value.keywords)
    return "object", id(value)


def _is_small_and_real(tensor: Tensor) -> bool:
    there = not is_fake(tensor) and tensor.device.type != "meta" and tensor.layout is torch.strided
    return there and tensor.numel() <= _MAX_HASHED_NUMEL
