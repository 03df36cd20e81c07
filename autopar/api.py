"""The calls of the package: plan, simulate, parallelize."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.cluster.cluster import Cluster
from autopar.cluster.job import auto_cluster
from autopar.cluster.parse import parse_cluster
from autopar.errors import AutoparError, InputError, PlanMismatchError
from autopar.files import write_text
from autopar.gloo import one_worker_thread
from autopar.graph.capture import Captured, capture, check_model
from autopar.graph.model_call import each_tensor
from autopar.graph.model_graph import ModelGraph
from autopar.plan.dtypes import param_dtype, torch_dtype
from autopar.plan.file import load_plan, plan_from_json, plan_to_json, save_plan
from autopar.plan.plan import Plan
from autopar.plan.verify import machine_of, verify_plan
from autopar.runtime.engine import Trainer
from autopar.runtime.given_models import GivenModel
from autopar.runtime.optimizers import OptimizerFactory
from autopar.search.candidates import fixed_axes
from autopar.search.fleet import choose_devices
from autopar.search.objective import Objective, goal_of
from autopar.search.planner import PlanRequest, find_plan
from autopar.simulate.simulator import simulate as simulate_plan
from autopar.simulate.timeline import Timeline

log = logging.getLogger(__name__)

Example = Mapping[str, Any] | tuple[Any, ...]
LossFn = Callable[[Any, Any], Tensor]
_OPTIMIZERS = {"AdamW": "adamw", "Adam": "adam", "SGD": "sgd"}


@dataclass(frozen=True, kw_only=True)
class PlannedModel(Plan):
    """A plan together with the model and the cluster that it was made for. Files keep the plan, and its picture."""

    graph: ModelGraph = field(repr=False, compare=False)
    cluster: Cluster = field(repr=False, compare=False)

    def save(self, path: str | Path) -> None:
        """Write the plan file, with the picture that `autopar viz` draws."""
        from autopar.viz.picture import picture

        save_plan(self, path, picture(self.graph, self.cluster, self, simulate(self)))

    def draw(self, path: str | Path) -> None:
        """Write the page that `autopar viz` makes of the plan: one HTML file that opens from disk."""
        from autopar.viz.page import page_html
        from autopar.viz.picture import picture

        write_text(Path(path), page_html(picture(self.graph, self.cluster, self, simulate(self))))


def plan(
    model: nn.Module, example_batch: Example, *, cluster: Cluster | str, global_batch: int,
    loss_fn: LossFn | None = None, dtype: str | None = None, optimizer: str = "adamw", micro_batch: int | None = None,
    max_search_seconds: float | None = None, compile: bool = False, offload: bool = True,  # noqa: A002
    objective: str = "time", max_step_seconds: float | None = None, idle_devices: bool = False,
    mesh: Mapping[str, int] | None = None,
) -> PlannedModel:
    """The best plan found for a model on a cluster, with its certificate; no device is needed.

    `objective`: "time" is the fastest step, "cost" the cheapest (the cluster's devices need prices), and "devices" the
    fewest devices whose step takes at most `max_step_seconds`. The plan may then be for a part of the cluster, which
    is its `cluster`; the fastest uses all devices, unless `idle_devices` allows to leave some unused. `mesh` fixes the
    sizes of axes, as in {"tp": 4, "pp": 2}: pp, dp, dp_replicate, dp_shard, ep, cp, tp; the rest is searched.

    The model may be real, fake or on the meta device. `dtype` ("bf16", "float32", ...) is the one to compute in, the
    model's own if left out. `offload`: activations and optimizer state may rest in host memory where that pays.
    InfeasibleError, naming the smallest change that helps, where nothing fits.
    """
    machine = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    compute = _dtype(dtype, model)
    graph = _captured(model, example_batch, loss_fn, compute).graph
    request = PlanRequest(
        global_batch=global_batch, seq_len=graph.sequence_length, dtype=compute, param_dtype=param_dtype(compute),
        optimizer=optimizer, micro_batch=micro_batch, max_search_seconds=max_search_seconds, compile=compile,
        offload=offload, mesh=fixed_axes(mesh or {}),
    )
    aim = Objective(goal=goal_of(objective), max_step_time_s=max_step_seconds)
    choice = choose_devices(graph, machine, request, aim, idle=idle_devices)
    found = choice.plan
    return PlannedModel(
        **{item.name: getattr(found, item.name) for item in fields(found)}, graph=graph, cluster=choice.best.cluster
    )


def simulate(
    plan: Plan, *, graph: ModelGraph | None = None, cluster: Cluster | str | None = None
) -> Timeline:
    """The predicted step of a plan: time and memory of every device.

    What `autopar.plan` returned needs nothing else. A plan from a file needs the model's `graph`, and `cluster` where
    the plan's cluster was not written in shorthand.
    """
    if isinstance(plan, PlannedModel):
        graph, cluster = graph or plan.graph, cluster or plan.cluster
    if graph is None:
        raise InputError("a plan from a file does not hold its model: give simulate(plan, graph=...) too")
    machine = parse_cluster(cluster or plan.cluster_name) if not isinstance(cluster, Cluster) else cluster
    machine = machine_of(plan, machine)
    verify_plan(plan, graph, machine)
    return simulate_plan(graph, machine, plan)


def parallelize(
    model: nn.Module, example_batch: Example, optimizer: OptimizerFactory, *, loss_fn: LossFn | None = None,
    plan: Plan | str | Path | None = None, cluster: Cluster | str | None = None, global_batch: int | None = None,
    dtype: str | None = None, micro_batch: int | None = None, max_search_seconds: float | None = None,
    device: torch.device | str | None = None, timeout_s: float = 1800.0, offload: bool = False,
    weights: str | Path | None = None, stop_on_nan: bool = False, log_every: int = 0,
    mesh: Mapping[str, int] | None = None,
) -> Trainer:
    """A Trainer that runs the model over all processes of the job, under torchrun or alone.

    `example_batch` is a dict of keyword arguments or a tuple; `model(**example_batch)` returns a scalar loss or an
    object with `.loss`, or `loss_fn(output, batch)` gives it, for which the batch may hold more than the model takes.
    Without `plan` (a Plan or its file), rank 0 plans for `cluster`, or for the job's machines as `auto` finds them, and
    `global_batch` rows a step, or as many as the example has.
    `offload` lets that plan rest activations and optimizer state in host memory, and `mesh` fixes sizes of its axes,
    as in {"tp": 2}.
    `optimizer` makes a torch optimizer from parameters: `lambda p: torch.optim.AdamW(p, lr=3e-4)`. Every rank calls
    it with the same arguments; rank 0's weights are used, or those of the safetensors files in `weights`, of which
    each rank reads its own parts; the model may then be made in `autopar.empty_parameters()`.
    `stop_on_nan`: a loss that is not finite raises NotFiniteError on every rank before the optimizer steps.
    `log_every`: every so many steps rank 0 logs step time, tokens/s, MFU and peak memory to "autopar.training".
    """
    place = _open_job(device, timeout_s)
    world = dist.get_world_size() if dist.is_initialized() else 1
    captured: Captured | None = None

    def decide() -> str:
        nonlocal captured
        if plan is not None:
            return plan_to_json(plan if isinstance(plan, Plan) else load_plan(Path(plan)))
        machine = parse_cluster(cluster) if isinstance(cluster, str) else cluster or auto_cluster(
            os.environ, num_processes=world, device_type=place.type)
        if machine.num_devices != world:
            raise PlanMismatchError(
                f"cluster {machine.name} has {machine.num_devices} devices, and the job has {world} processes"
            )
        compute = _dtype(dtype, model)
        captured = _captured(model, example_batch, loss_fn, compute, evaluates=True)
        rows = global_batch if global_batch is not None else _rows(example_batch)
        request = PlanRequest(
            global_batch=rows, seq_len=captured.graph.sequence_length, dtype=compute,
            param_dtype=param_dtype(compute), optimizer=_optimizer_name(optimizer, model), micro_batch=micro_batch,
            max_search_seconds=max_search_seconds, offload=offload, mesh=fixed_axes(mesh or {}),
        )
        return plan_to_json(find_plan(captured.graph, machine, request))

    chosen = plan_from_json(_from_first(decide))
    if captured is None:
        captured = _captured(model, example_batch, loss_fn, chosen.dtype, evaluates=True)
    own = plan_to_json(plan if isinstance(plan, Plan) else load_plan(Path(plan))) if plan is not None else None
    _agree(chosen, captured.graph, is_same=own is None or plan_from_json(own) == chosen)
    trainer = Trainer(
        model, chosen, captured, optimizer, device=place, timeout_s=timeout_s, weights=weights,
        stop_on_nan=stop_on_nan, log_every=log_every, peak_flops=_peak_flops(chosen, cluster) if log_every else None,
    )
    trainer.checks.given = GivenModel(model)
    return trainer


def _peak_flops(plan: Plan, cluster: Cluster | str | None) -> float | None:
    """FLOP/s of all devices of the plan's cluster; None, with a word, where its description is not at hand."""
    try:
        machine = parse_cluster(cluster or plan.cluster_name) if not isinstance(cluster, Cluster) else cluster
        return sum(node.device.peak(plan.dtype) * node.num_devices for node in machine.nodes)
    except AutoparError:
        log.info("the peak of %s is not known: no MFU; give cluster=...", plan.cluster_name)
        return None


# -- the job


def _open_job(device: torch.device | str | None, timeout_s: float) -> torch.device:
    """This process's device; joins the job that torchrun's variables describe, if no process group is there yet."""
    if device is None:
        index = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    else:
        place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        with one_worker_thread():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        atexit.register(close_job)
    return place


def close_job() -> None:
    """Leave the process group, if there is one still."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _from_first(make: Callable[[], str]) -> str:
    """Rank 0's text on every rank; rank 0's error is raised on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except AutoparError as error:
            box[1] = error
        except Exception as error:
            dist.broadcast_object_list([None, AutoparError(f"rank 0 failed: {error}")], src=0)
            raise
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    text: str = box[0]
    return text


def _agree(plan: Plan, graph: ModelGraph, *, is_same: bool) -> None:
    """Raise on every rank if the plan is not for the model of any one of them, or was not given to it (`is_same`)."""
    problem: str | None = None if is_same else "it was given another plan than rank 0; give every rank the same"
    try:
        verify_plan(plan, graph)
    except InputError as error:
        problem = str(error)
    found: list[str | None] = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem)
    for rank, text in enumerate(found):
        if text is not None:
            raise PlanMismatchError(f"rank {rank}: {text}" if len(found) > 1 else text)


# -- the model


def _dtype(name: str | None, model: nn.Module) -> str:
    """torch's word for the compute dtype that was asked for, or for the model's own."""
    if name is None:
        own = next((param.dtype for param in model.parameters() if param.is_floating_point()), torch.float32)
        return str(own).removeprefix("torch.")
    return torch_dtype(name)


def _optimizer_name(factory: OptimizerFactory, model: nn.Module) -> str:
    """What the planner calls the optimizer that the factory makes (of parameters of the model's shapes, unwritten)."""
    params = [
        nn.Parameter(torch.zeros((), dtype=param.dtype).expand(param.shape), requires_grad=param.requires_grad)
        for param in model.parameters()
    ]
    made = type(factory(params or [nn.Parameter(torch.zeros(1))])).__name__
    if made not in _OPTIMIZERS:
        log.warning("planning the memory of optimizer %s as that of AdamW", made)
    return _OPTIMIZERS.get(made, "adamw")


def _rows(example: Example) -> int:
    values = example.values() if isinstance(example, Mapping) else example
    return next(value.shape[0] for value in values if isinstance(value, Tensor) and value.dim())


@contextlib.contextmanager
def _parameters_in(model: nn.Module, dtype: str) -> Iterator[None]:
    """The model with fake parameters of a dtype in place of its own, which come back afterwards."""
    wanted: torch.dtype = getattr(torch, dtype)
    if all(param.dtype == wanted or not param.is_floating_point() for param in model.parameters()):
        yield
        return
    own = [(module, name, param) for module in model.modules() for name, param in module._parameters.items()]
    fakes: dict[int, nn.Parameter] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module, name, param in own:
                if param is not None and id(param) not in fakes:
                    kind = wanted if param.is_floating_point() else param.dtype
                    fake = torch.empty(param.shape, dtype=kind, device=param.device)
                    fakes[id(param)] = nn.Parameter(fake, requires_grad=param.requires_grad)
                if param is not None:
                    module._parameters[name] = fakes[id(param)]
        yield
    finally:
        for module, name, param in own:
            module._parameters[name] = param


def _captured(
    model: nn.Module, example: Example, loss_fn: LossFn | None, dtype: str, *, evaluates: bool = False
) -> Captured:
    """The model captured in a compute dtype, with tagged rows."""
    check_model(model)
    wanted: torch.dtype = getattr(torch, dtype)
    batch = each_tensor(example, lambda value: value.to(wanted) if value.is_floating_point() else value)
    with _parameters_in(model, dtype):
        return capture(model, batch, loss_fn=loss_fn, tag_rows=True, evaluates=evaluates)
