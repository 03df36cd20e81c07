"""A `transformers.Trainer` that trains under a plan: its loop, data, scheduler, logs and callbacks stay as they are.

The Trainer asks a few methods of its own for the model that runs, a training step, the norm of the gradients and the
files of a checkpoint. `parallelize_trainer` puts a class before the Trainer's own that answers these from an
`autopar.Trainer`. What would be left out in silence (a loss of one's own, say) is refused.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopar.api import close_job, parallelize
from autopar.errors import InputError
from autopar.plan.text import headline
from autopar.runtime.engine import Trainer

log = logging.getLogger(__name__)

FOLDER = "autopar"  # in a checkpoint's folder: parameters and optimizer state, which load under any other plan
SCHEDULER = "scheduler.pt"


def parallelize_trainer(trainer: Any, **options: Any) -> Any:
    """The same `transformers.Trainer`, whose `train()` now runs under a plan over all processes of the job.

    `options` are those of `autopar.parallelize`: `plan`, `cluster`, `max_search_seconds` and so on. Rows of a step:
    `per_device_train_batch_size` times the processes times `gradient_accumulation_steps`, in the Trainer's order;
    batches are of one shape, so give `dataloader_drop_last=True`. `bf16=True` computes in bfloat16.
    The plan is made when `train()` begins; `trainer.autopar` is then the `autopar.Trainer`. Where a plan fits, the
    losses are those that the Trainer logs on one process. InputError for what a planned step cannot honour.
    """
    if isinstance(trainer, _Planned):
        raise InputError("this Trainer has been parallelized before")
    if reason := _refused(trainer):
        raise InputError(f"transformers.Trainer under a plan: {reason}")
    kind = type(trainer)
    trainer.__class__ = type(f"Planned{kind.__name__}", (_Planned, kind), {})
    trainer.autopar, trainer._autopar_options, trainer._autopar_kept = None, options, []
    return trainer


def _refused(trainer: Any) -> str:
    """What of a Trainer's settings a planned step would leave out, and what to do; "" where nothing is."""
    if not any(cls.__module__ == "transformers.trainer" for cls in type(trainer).__mro__):
        return f"it is a {type(trainer).__name__}: give the Trainer that train() would be called of"
    args = trainer.args
    for name in ("compute_loss", "training_step"):
        owner = next(cls for cls in type(trainer).__mro__ if name in vars(cls))
        if owner.__module__ != "transformers.trainer":
            return f"{owner.__name__}.{name} would not be called: let the model return its loss"
    found = [
        (trainer.compute_loss_func is not None, "compute_loss_func would not be called: let the model return its loss"),
        (args.label_smoothing_factor != 0, "label_smoothing_factor is of the Trainer's own loss: smooth in the model"),
        (trainer.optimizer is not None, "optimizers= holds whole parameters: name the optimizer in TrainingArguments"),
        (args.fp16, "float16 needs loss scaling, which is not there: use bf16=True"),
        (args.gradient_checkpointing, "the plan decides what to recompute: leave gradient_checkpointing off"),
        (bool(args.deepspeed or args.fsdp), "the plan shards: leave deepspeed and fsdp off"),
        (args.torch_compile, "torch_compile would wrap a model that does not run: leave it off"),
        (args.neftune_noise_alpha is not None, "NEFTune hooks a model that does not run: leave it off"),
        (args.load_best_model_at_end, "load_best_model_at_end is not there: load the best checkpoint yourself"),
        (args.auto_find_batch_size, "the plan finds what fits: leave auto_find_batch_size off"),
        (args.n_gpu > 1, "one process sees several GPUs: start one for each, with torchrun"),
    ]
    return next((text for is_so, text in found if is_so), "")


class _Planned:
    """What a parallelized Trainer answers differently; its own class comes next in the order of look-up."""

    autopar: Trainer | None
    _autopar_options: dict[str, Any]
    _autopar_kept: list[dict[str, Any]]  # batches of a step whose gradients are accumulated, until the last is there

    # The attributes of transformers.Trainer that are used here.
    args: Any
    accelerator: Any
    model: nn.Module
    optimizer: Any
    lr_scheduler: Any

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Compiles the plan, since only then it is known which parts of parameters this rank steps."""
        if self.autopar is None:
            own: Any = self
            kind, settings = own.optimizer_cls_and_kwargs or own.get_optimizer_cls_and_kwargs(self.args, self.model)
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
                raise InputError(f"optim={self.args.optim} needs the whole model: use one of torch's optimizers")
            rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            options = {"dtype": "bf16" if self.args.bf16 else None, "global_batch": rows} | self._autopar_options
            atexit.register(close_job)  # the group that accelerate opened: gloo aborts where a process ends with it
            self.autopar = parallelize(
                self.model, self._first_batch(), lambda params: kind(params, **settings), **options
            )
            if self.autopar.offloaded_state is not None:
                raise InputError("the plan keeps optimizer state in host memory, which the Trainer's loop cannot step")
            if self.autopar.whole_steps is not None:
                raise InputError(f"optim={self.args.optim} looks at whole parameters, of which the plan leaves ranks "
                                 "parts: the Trainer's loop cannot step it; use adamw_torch")
            self._decay(self.autopar.optimizer)
            log.info("training under a plan: %s", headline(self.autopar.plan))
            # Accelerate would take the norm of this rank's parts alone.
            self.accelerator.clip_grad_norm_ = self._clip
        self.optimizer = self.autopar.optimizer
        return self.autopar.optimizer

    def _first_batch(self) -> dict[str, Any]:
        """One process's batch, without a step of the loader, its sampler or the random numbers."""
        loader = self.get_train_dataloader()  # type: ignore[attr-defined]
        plain = getattr(loader, "base_dataloader", loader)
        if not self.args.dataloader_drop_last and len(plain.dataset) % self.args.train_batch_size:
            raise InputError("the last batch of an epoch has fewer rows than the plan: give dataloader_drop_last=True")
        if len(loader) % self.args.gradient_accumulation_steps:
            raise InputError(
                f"an epoch of {len(loader)} batches ends in the middle of a step of "
                f"{self.args.gradient_accumulation_steps} (gradient_accumulation_steps): let them divide"
            )
        with torch.random.fork_rng(devices=[]):
            return dict(next(iter(plain)))

    def _decay(self, optimizer: torch.optim.Optimizer) -> None:
        """Parts the parameters into those with weight decay and those without, as the Trainer does."""
        assert self.autopar is not None
        decayed = set(self.get_decay_parameter_names(self.model))  # type: ignore[attr-defined]
        named = {id(param): name.split("@")[0] for name, param in self.autopar.named_parameters().items()}
        (group,) = optimizer.param_groups
        others = [param for param in group["params"] if named.get(id(param)) not in decayed]
        group["params"] = [param for param in group["params"] if named.get(id(param)) in decayed]
        group["weight_decay"] = self.args.weight_decay
        optimizer.add_param_group({"params": others, "weight_decay": 0.0})

    def _clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        assert self.autopar is not None and norm_type == 2
        return self.autopar.clip_gradients(max_norm)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The module with this rank's parameters, which keeps Accelerate from wrapping the whole model."""
        if self.autopar is None:
            wrapped: nn.Module = super()._wrap_model(model, training, dataloader)  # type: ignore[misc]
            return wrapped
        return self.autopar.module

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Loss and gradients of the whole step at its last batch; zero at the batches before."""
        assert self.autopar is not None
        self._autopar_kept.append(self._global(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        kept, self._autopar_kept = self._autopar_kept, []
        batch = kept[0] if len(kept) == 1 else {
            name: torch.cat([one[name] for one in kept]) if isinstance(value, Tensor) and value.dim() else value
            for name, value in kept[0].items()
        }
        return self.autopar.forward_backward(batch).detach().to(self.args.device, torch.float32)

    def _global(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The rows of all processes, in their order, on each: the plan decides who computes which."""
        own = dict(self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        return dict(self.accelerator.gather(own)) if self.args.world_size > 1 else own

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        if self.autopar is None:
            found: tuple[Tensor | None, Any, Any] = super().prediction_step(  # type: ignore[misc]
                model, inputs, prediction_loss_only, ignore_keys)
            return found
        if not prediction_loss_only:
            raise InputError("a planned model gives its loss alone: set prediction_loss_only=True, or predict with the "
                             "saved model")
        return self.autopar.evaluate(self._global(inputs)).detach().to(self.args.device), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Fetches the weights into the model on rank 0, then saves it."""
        if self.autopar is not None:
            weights = self.autopar.full_state_dict()
            if weights:
                self.model.load_state_dict(weights)
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.autopar is not None
        self.autopar.save(Path(output_dir) / FOLDER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint) / FOLDER
        if not folder.is_dir():
            raise InputError(f"{checkpoint}: it has no folder {FOLDER!r}, so no planned Trainer saved its optimizer")
        assert self.autopar is not None
        self.autopar.load(folder)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
