"""Parameters, gradients and optimizer state as full tensors under the model's own names, and their files.

A checkpoint is a directory of torch.distributed.checkpoint: `model.NAME` for parameters and buffers,
`optimizer.NAME.KEY` for the optimizer's state of a parameter, `optimizer.NAME.options` for its group's settings. It
says nothing of the plan that wrote it, so any plan of the same model reads it. Every rank writes and reads what it
holds, chunk by chunk: none has a full copy at any time, but of optimizer state that every rank has whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_files
from torch.distributed.checkpoint.state_dict_saver import save as write_files

from autopar.errors import InputError
from autopar.runtime.checkpoint_planners import HeldLoadPlanner, HeldSavePlanner
from autopar.runtime.chunks import HeldTensor, held_chunks, whole
from autopar.runtime.data_parallel import from_held, local_tensor
from autopar.runtime.fused_step import place_step_counts
from autopar.runtime.layout import ParamLayout
from autopar.runtime.parts import gathered, mesh_of

if TYPE_CHECKING:
    from autopar.runtime.engine import Trainer

log = logging.getLogger(__name__)


def own_parameters(trainer: Trainer) -> Iterator[tuple[int, ParamLayout, nn.Parameter]]:
    """Stage, layout and parameter of everything that this rank holds, in one order on all ranks of a stage."""
    for stage in trainer.stages:
        own = dict(stage.module.named_parameters(remove_duplicate=False))
        for param in trainer.layout.of_stage(stage.index):
            yield stage.index, param, own[param.name]


def _gathered(trainer: Trainer, value: Tensor, param: ParamLayout) -> Tensor:
    return gathered(value.detach(), param, trainer.groups)


def _speaks(trainer: Trainer, stage: int, param: ParamLayout) -> bool:
    """Whether this rank is the one that keeps a gathered parameter: the first of the first stage that has it."""
    return trainer.groups.place.lane == 0 and stage == param.stages[0]


def full_parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Full parameters and buffers for which this rank speaks, on the CPU."""
    found: dict[str, Tensor] = {}
    for stage, param, value in own_parameters(trainer):
        full = _gathered(trainer, value, param)
        if _speaks(trainer, stage, param):
            found.update(dict.fromkeys(param.names, full.cpu()))
    if trainer.groups.place.lane == 0:
        for local in trainer.stages:
            found.update({name: value.detach().cpu() for name, value in local.module.named_buffers()})
            if local.index == 0:
                found.update(trainer.extra_state)
    return found


def full_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Full gradients for which this rank speaks, by the first name of each parameter, on the CPU."""
    found: dict[str, Tensor] = {}
    for stage, param, value in own_parameters(trainer):
        if value.grad is not None:
            full = _gathered(trainer, value.grad, param)
            if _speaks(trainer, stage, param):
                found[param.name] = full.cpu()
    return found


def gather_to_first(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every rank's dict merged on rank 0; empty elsewhere."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts)
    return {name: value for part in parts or () for name, value in part.items()}


def save(trainer: Trainer, directory: Path) -> None:
    """Write a checkpoint to a directory beside `directory`, then put it in its place.

    At every moment `directory`, or what was it until then (`directory`.old), is whole.
    """
    state = _held_state(trainer)
    partial, old = directory.with_name(directory.name + ".partial"), directory.with_name(directory.name + ".old")
    if _is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    try:
        with _quiet():
            write_files(
                state, checkpoint_id=partial, planner=HeldSavePlanner(), no_dist=not dist.is_initialized()
            )
    except (CheckpointException, OSError) as error:
        raise InputError(
            f"the checkpoint could not be written to {partial}: {_cause(error)}; {directory} is as it was"
        ) from error
    _barrier()
    if _is_first():
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    _barrier()


def _held_state(trainer: Trainer) -> dict[str, Any]:
    """All that this rank may have to write: held tensors, and settings as text."""
    state: dict[str, Any] = {}
    options = _group_options(trainer)
    for stage, param, parameter in own_parameters(trainer):
        if stage != param.stages[0]:
            continue
        speaks, shape = _speaks(trainer, stage, param), trainer.graph.param[param.name].shape
        chunks = held_chunks(shape, param, parameter, trainer.groups)
        for name in param.names:
            state[f"model.{name}"] = HeldTensor(local_tensor(parameter), shape, chunks)
        with _state_on_device(trainer, parameter):
            for key, value in trainer.optimizer.state.get(parameter, {}).items():
                name = f"optimizer.{param.name}.{key}"
                if isinstance(value, Tensor) and _is_laid_out(trainer, value.shape, parameter.shape):
                    state[name] = HeldTensor(_stays(trainer, local_tensor(value)), shape, chunks)
                elif speaks:
                    state[name] = whole(_stays(trainer, value)) if isinstance(value, Tensor) else value
        if speaks and parameter in options:
            state[f"optimizer.{param.name}.options"] = options[parameter]
    if trainer.groups.place.lane == 0:
        for local in trainer.stages:
            buffers = {**dict(local.module.named_buffers()), **(trainer.extra_state if local.index == 0 else {})}
            state.update({f"model.{name}": whole(value) for name, value in buffers.items()})
    return state


def _stays(trainer: Trainer, value: Tensor) -> Tensor:
    """The tensor, or a copy in host memory where it is on the device only for the moment."""
    return value if trainer.offloaded_state is None else value.detach().to("cpu", copy=True)


def load(trainer: Trainer, directory: Path) -> None:
    """Read a checkpoint of the same model, written under any plan. Nothing changes unless all of it can be read."""
    directory, metadata = _whole(directory)
    held = list(own_parameters(trainer))
    buffers = {name: value for stage in trainer.stages for name, value in stage.module.named_buffers()}
    _check_model(trainer, directory, metadata, [param.name for _, param, _ in held], buffers)
    wanted: dict[str, Any] = {f"model.{name}": _room(metadata[f"model.{name}"]) for name in buffers}
    keys = _state_keys(metadata)
    for _, param, parameter in held:
        shape = trainer.graph.param[param.name].shape
        chunks = held_chunks(shape, param, parameter, trainer.groups)
        for key in (f"model.{param.name}", *keys.get(param.name, ())):
            found = metadata[key]
            if key.startswith("model.") or (
                isinstance(found, TensorStorageMetadata) and _is_laid_out(trainer, found.size, shape)
            ):
                local = torch.zeros(local_tensor(parameter).shape, dtype=found.properties.dtype)
                wanted[key] = HeldTensor(local, shape, chunks)
            else:
                wanted[key] = _room(found)
    try:
        with _quiet():
            read_files(
                wanted, checkpoint_id=directory, planner=HeldLoadPlanner(), no_dist=not dist.is_initialized()
            )
    except (CheckpointException, OSError) as error:
        raise InputError(f"checkpoint {directory} is damaged: {_cause(error)}; load another one") from error
    options = {}
    with torch.no_grad():
        for _, param, parameter in held:
            local_tensor(parameter).copy_(wanted[f"model.{param.name}"].local)
            prefix = f"optimizer.{param.name}."
            own = {key.removeprefix(prefix): wanted[key] for key in keys.get(param.name, ())}
            options[parameter] = own.pop("options", None)
            if own:
                with _state_on_device(trainer, parameter):
                    trainer.optimizer.state[parameter] = {
                        key: _state_of(trainer, value, param, parameter) for key, value in own.items()
                    }
                    place_step_counts(trainer.optimizer, parameter)
        for name, value in buffers.items():
            value.copy_(wanted[f"model.{name}"].local)
    for group in trainer.optimizer.param_groups:
        saved = next((options[p] for p in group["params"] if options.get(p)), None)
        if saved is not None:
            _restore_options(group, json.loads(saved))


def _check_model(
    trainer: Trainer, directory: Path, metadata: Mapping[str, Any], params: Sequence[str], buffers: Mapping[str, Tensor]
) -> None:
    """InputError unless the checkpoint has these parameters and these buffers, each a tensor of its shape."""
    shapes = {name: tuple(value.shape) for name, value in buffers.items()}
    shapes |= {name: trainer.graph.param[name].shape for name in params}
    for name, shape in sorted(shapes.items()):
        found = metadata.get(f"model.{name}")
        if not isinstance(found, TensorStorageMetadata):
            kind = "no" if found is None else "no tensor"
            raise InputError(f"checkpoint {directory} has {kind} {name}; it is of another model")
        if tuple(found.size) != tuple(shape):
            raise InputError(f"{name} in checkpoint {directory} is not of shape {list(shape)}; it is of another model")


def _state_keys(metadata: Iterable[str]) -> dict[str, list[str]]:
    """The keys of what the checkpoint has of the optimizer, by parameter."""
    found: dict[str, list[str]] = {}
    for key in metadata:
        if key.startswith("optimizer."):
            found.setdefault(key.removeprefix("optimizer.").rpartition(".")[0], []).append(key)
    return found


def _room(found: Any) -> HeldTensor | None:
    """Where to read to what every rank that wants it wants whole; None for an object."""
    if not isinstance(found, TensorStorageMetadata):
        return None
    return whole(torch.empty(found.size, dtype=found.properties.dtype))


def _state_of(trainer: Trainer, value: Any, param: ParamLayout, parameter: Tensor) -> Any:
    """A piece of the optimizer's state as this rank keeps it, from what was read."""
    if not isinstance(value, HeldTensor):
        return value
    if not _is_laid_out(trainer, value.shape, trainer.graph.param[param.name].shape):
        return value.local
    return from_held(value.local.to(parameter.device), parameter, mesh_of(param, trainer.groups))


def _whole(directory: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint with the metadata of its values, checked to be there as a whole; InputError where it is not.

    Where a save was cut between taking away the old checkpoint and putting the new one there, it is the old one.
    """
    old = directory.with_name(directory.name + ".old")
    if not directory.exists() and (old / ".metadata").exists():
        log.warning("%s was being replaced when its writer ended: loading %s, which was it before", directory, old)
        directory = old
    if not (directory / ".metadata").exists():
        raise InputError(f"{directory} is no checkpoint (it has no .metadata file)")
    try:
        metadata = FileSystemReader(directory).read_metadata()
    except Exception as error:  # whatever unpickling half a file raises
        raise InputError(f"checkpoint {directory} is damaged: its .metadata cannot be read ({_cause(error)})") from None
    for info in (metadata.storage_data or {}).values():
        file, end = directory / info.relative_path, info.offset + info.length
        size = file.stat().st_size if file.exists() else 0
        if size < end:
            raise InputError(
                f"checkpoint {directory} is damaged: {file.name} has {size} bytes and should have {end} or more; load "
                "another one"
            )
    return directory, metadata.state_dict_metadata


def _cause(error: BaseException) -> str:
    """The first failure of any rank in one line."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return f"{type(first).__name__}: {' '.join(str(first).split())[:200]}"


def _state_on_device(trainer: Trainer, parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
    """Meanwhile the optimizer's state of the parameter is on the device, where the plan keeps it elsewhere."""
    offloaded = trainer.offloaded_state
    return contextlib.nullcontext() if offloaded is None else offloaded.on_device([parameter])


def _is_laid_out(trainer: Trainer, size: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a piece of optimizer state has the parameter's shape and so its layout."""
    return len(size) > 0 and tuple(size) == tuple(shape) and trainer.whole_steps is None


def _group_options(trainer: Trainer) -> dict[Tensor, str]:
    """The settings of each parameter's group as JSON (torch.distributed.checkpoint would take a dict apart)."""
    found: dict[Tensor, str] = {}
    for group in trainer.optimizer.param_groups:
        values = {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()
                  if isinstance(value, bool | int | float | str | list | tuple | Tensor | None) and key != "params"}
        found.update(dict.fromkeys(group["params"], json.dumps(values)))
    return found


def _restore_options(group: dict[str, Any], saved: dict[str, Any]) -> None:
    for key, value in saved.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(value, list) else value


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a process alone saves and loads as a process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process", category=UserWarning)
        yield


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
