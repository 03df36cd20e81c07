"""Parameters, gradients and optimizer state as full tensors under the model's own names, and their files.

A checkpoint is a directory of torch.distributed.checkpoint: `model.NAME` for parameters and buffers,
`optimizer.NAME.KEY` for the optimizer's state of a parameter, `optimizer.NAME.options` for its group's settings. It
says nothing of the plan that wrote it, so any plan of the same model reads it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
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
from autopar.runtime.fused_step import place_step_counts
from autopar.runtime.layout import ParamLayout
from autopar.runtime.parts import gathered, laid_out

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
    state: dict[str, Any] = {f"model.{name}": value for name, value in full_parameters(trainer).items()}
    options = _group_options(trainer)
    for stage, param, parameter in own_parameters(trainer):
        speaks = _speaks(trainer, stage, param)
        with _state_on_device(trainer, parameter):
            for key, value in trainer.optimizer.state.get(parameter, {}).items():
                full = _gathered(trainer, value, param) if _is_laid_out(trainer, value, parameter.shape) else value
                if speaks:
                    copied = full.detach().to("cpu", copy=True) if isinstance(full, Tensor) else full
                    state[f"optimizer.{param.name}.{key}"] = copied
        if speaks and parameter in options:
            state[f"optimizer.{param.name}.options"] = options[parameter]
    partial, old = directory.with_name(directory.name + ".partial"), directory.with_name(directory.name + ".old")
    if _is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    try:
        with _quiet():
            write_files(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
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


def load(trainer: Trainer, directory: Path) -> None:
    """Read a checkpoint of the same model, written under any plan. Nothing changes unless all of it can be read."""
    directory, metadata = _whole(directory)
    held = list(own_parameters(trainer))
    buffers = {name: value for stage in trainer.stages for name, value in stage.module.named_buffers()}
    wanted: dict[str, Any] = {}
    keys = {f"model.{param.name}" for _, param, _ in held} | {f"model.{name}" for name in buffers}
    if missing := sorted(keys - metadata.keys()):
        raise InputError(f"checkpoint {directory} has no {missing[0].removeprefix('model.')}; it is of another model")
    prefixes = tuple(f"optimizer.{param.name}." for _, param, _ in held)
    for key, found in metadata.items():
        if key in keys or (key.startswith(prefixes) and key.rpartition(".")[0] + "." in prefixes):
            if isinstance(found, TensorStorageMetadata):
                wanted[key] = torch.empty(found.size, dtype=found.properties.dtype)
            else:
                wanted[key] = None
    for _, param, _ in held:
        shape = trainer.graph.param[param.name].shape
        if tuple(wanted[f"model.{param.name}"].shape) != shape:
            raise InputError(
                f"{param.name} in checkpoint {directory} is not of shape {list(shape)}; it is of another model"
            )
    try:
        with _quiet():
            read_files(wanted, checkpoint_id=directory, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError) as error:
        raise InputError(f"checkpoint {directory} is damaged: {_cause(error)}; load another one") from error
    options = {}
    with torch.no_grad():
        for _, param, parameter in held:
            parameter.copy_(_laid_out(trainer, wanted[f"model.{param.name}"], param, parameter))
            prefix = f"optimizer.{param.name}."
            own = {key.removeprefix(prefix): value for key, value in wanted.items() if key.startswith(prefix)}
            options[parameter] = own.pop("options", None)
            if own:
                shape = trainer.graph.param[param.name].shape
                with _state_on_device(trainer, parameter):
                    trainer.optimizer.state[parameter] = {
                        key: _laid_out(trainer, value, param, parameter)
                        if _is_laid_out(trainer, value, shape) else value
                        for key, value in own.items()
                    }
                    place_step_counts(trainer.optimizer, parameter)
        for name, value in buffers.items():
            value.copy_(wanted[f"model.{name}"])
    for group in trainer.optimizer.param_groups:
        saved = next((options[p] for p in group["params"] if options.get(p)), None)
        if saved is not None:
            _restore_options(group, json.loads(saved))


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


def _is_laid_out(trainer: Trainer, value: Any, shape: Sequence[int]) -> bool:
    """Whether a piece of optimizer state has the parameter's shape and so its layout."""
    alike = isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) == tuple(shape)
    return alike and trainer.whole_steps is None


def _laid_out(trainer: Trainer, full: Tensor, param: ParamLayout, parameter: Tensor) -> Tensor:
    """A full tensor as this rank holds it: its part on the tensor axis, then as the data axes shard the parameter."""
    return laid_out(full.to(parameter.device), param, parameter, trainer.groups)


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
