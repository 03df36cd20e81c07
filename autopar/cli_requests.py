"""What `simulate` is asked, one request at a time or thousands from a file, and the answers."""

from __future__ import annotations

import codecs
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autopar.errors import AutoparError, InputError
from autopar.plan.dtypes import param_dtype, torch_dtype
from autopar.plan.plan import MOST_ROWS, Recompute, Schedule

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster
    from autopar.graph.model_graph import ModelGraph
    from autopar.plan.plan import Plan
    from autopar.simulate.timeline import Timeline

Degree = Annotated[int, Field(ge=1)]
Value = TypeVar("Value")
# What a plan file decides.
_OF_A_PLAN = ("tp", "pp", "virtual_stages", "cp", "ep", "dp_replicate", "dp_shard", "zero", "micro_batch", "recompute",
              "schedule", "sequence_parallel", "offload_activations", "offload_optimizer", "compile")


class SimulateRequest(BaseModel):
    """The long options of `simulate`, by their names with underscores."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    cluster: str
    global_batch: Annotated[int, Field(ge=1, le=MOST_ROWS)]
    seq_len: Degree | None = None
    dtype: str = "bf16"
    optimizer: str = "adamw"
    attention: Literal["sdpa", "eager"] = "sdpa"
    plan: str | None = None
    tp: Degree = 1
    pp: Degree = 1
    virtual_stages: Degree = 1
    cp: Degree = 1
    ep: Degree = 1
    dp_replicate: Degree | None = None
    dp_shard: Degree | None = None
    zero: Annotated[int, Field(ge=0, le=3)] | None = None
    micro_batch: Degree = 1
    recompute: Annotated[Recompute, Field(strict=False)] = Recompute.NONE
    schedule: Annotated[Schedule, Field(strict=False)] | None = None
    sequence_parallel: bool = False
    offload_activations: bool = False
    offload_optimizer: bool = False
    compile: bool = False
    profile: str | None = None

    @staticmethod
    def parse(values: dict[str, Any]) -> SimulateRequest:
        """The request, or InputError that names the option at fault."""
        try:
            request = SimulateRequest.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(SimulateRequest.model_fields)
                raise InputError(f"unknown option {name!r}; the known ones are {known}") from None
            if first["type"] == "missing":
                raise InputError(f"the option {name!r} is missing") from None
            raise InputError(f"{name} = {first['input']!r}: {first['msg']}") from None
        fields = SimulateRequest.model_fields
        both = [name for name in _OF_A_PLAN if getattr(request, name) != fields[name].default]
        if request.plan is not None and both:
            raise InputError(f"{request.plan} decides {', '.join(both)}: give a plan or degrees, not both")
        return request

    def data_degrees(self, num_devices: int) -> tuple[int, int]:
        """(dp_replicate, dp_shard): what was asked, and for what was not, all devices that the other degrees leave."""
        rest, remainder = divmod(num_devices, self.tp * self.pp * self.cp)
        if remainder or not rest:
            raise InputError(
                f"tp {self.tp} x pp {self.pp} x cp {self.cp} does not divide the cluster's {num_devices} devices"
            )
        if self.dp_replicate is None and self.dp_shard is None:
            return (1, rest) if self.zero else (rest, 1)
        replicate = self.dp_replicate or rest // (self.dp_shard or 1)
        shard = self.dp_shard or rest // replicate
        if replicate * shard != rest:
            raise InputError(
                f"dp_replicate {replicate} x dp_shard {shard} x tp {self.tp} x pp {self.pp} x cp {self.cp} is not the "
                f"cluster's {num_devices} devices; the data degrees must make {rest}"
            )
        return replicate, shard


    def zero_level(self, dp_shard: int) -> int:
        """What was asked; else 3 where states are shared, as fully sharded data parallelism does, and 0 elsewhere."""
        return self.zero if self.zero is not None else (3 if dp_shard > 1 else 0)


class Cache:
    """The latest values made by key; a failure is kept as well, so that it costs once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._made: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key in self._made:
            self._made.move_to_end(key)
        else:
            try:
                self._made[key] = make()
            except AutoparError as error:
                self._made[key] = error
            if len(self._made) > self._size:
                self._made.popitem(last=False)
        value = self._made[key]
        if isinstance(value, AutoparError):
            raise value
        return value  # type: ignore[no-any-return]


class Simulations:
    """Answers requests; models and clusters that come again are captured and parsed once."""

    def __init__(self) -> None:
        self._graphs = Cache(32)
        self._clusters = Cache(256)
        self._choosers = Cache(32)  # keep what they chose for one model on one cluster

    def graph(
        self, model: str, seq_len: int | None, dtype: str, attention: str, *, fuse: bool = False
    ) -> ModelGraph:
        """The captured model that a text names."""
        def make() -> ModelGraph:
            from autopar.graph.source import capture_source, load_source

            return capture_source(load_source(model, seq_len=seq_len, dtype=dtype, attention=attention), fuse=fuse)

        return self._graphs.get((model, seq_len, dtype, attention, fuse), make)

    def cluster(self, text: str, profile: str | Path | None = None) -> Cluster:
        """The cluster of a text, with the rates of a profile file where one is given."""
        def make() -> Cluster:
            from autopar.cluster.parse import parse_cluster

            cluster = parse_cluster(text)
            if profile is None:
                return cluster
            from autopar.profiler import load_profile

            return load_profile(Path(profile)).apply(cluster)

        return self._clusters.get((text, profile), make)

    def simulate(
        self, request: SimulateRequest, *, as_run: bool = False, uncompiled: bool = False
    ) -> tuple[Plan, Timeline]:
        """The plan that the request describes or names, and its simulated step.

        `as_run`: also a plan of degrees is for the ops that this trainer runs; `uncompiled`: without torch.compile.
        """
        from autopar.simulate.simulator import simulate

        dtype = torch_dtype(request.dtype)
        cluster = self.cluster(request.cluster, request.profile)
        # Degrees ask what a training system makes of them; a plan, what this trainer runs.
        fuse = request.plan is None and not as_run
        graph = self.graph(request.model, request.seq_len, dtype, request.attention, fuse=fuse)
        plan, cluster = self._plan(request, graph, cluster, dtype)
        if uncompiled:
            plan = replace(plan, compile=False)
        return plan, simulate(graph, cluster, plan, as_system=fuse)

    def _plan(self, request: SimulateRequest, graph: ModelGraph, cluster: Cluster, dtype: str) -> tuple[Plan, Cluster]:
        """The plan, and what of the cluster it is for."""
        if request.plan is not None:
            from autopar.plan.file import load_plan
            from autopar.plan.verify import machine_of, verify_plan

            plan = load_plan(request.plan)
            cluster = machine_of(plan, cluster)
            verify_plan(plan, graph, cluster)
            if plan.global_batch != request.global_batch:
                raise InputError(f"{request.plan}: the plan is for a global batch of {plan.global_batch}, not "
                                 f"{request.global_batch}; plan again for that batch")
            return plan, cluster
        from autopar.search.degrees import Degrees, plan_from_degrees
        from autopar.search.shardings import ShardingChooser

        chooser = self._choosers.get(
            (request.model, request.seq_len, dtype, request.attention, request.cluster, request.profile),
            lambda: ShardingChooser(graph, cluster, dtype),
        )
        replicate, shard = request.data_degrees(cluster.num_devices)
        return plan_from_degrees(graph, cluster, Degrees(
            global_batch=request.global_batch, seq_len=graph.sequence_length, dtype=dtype,
            param_dtype=param_dtype(dtype),
            optimizer=request.optimizer, tp=request.tp, pp=request.pp, virtual_stages=request.virtual_stages,
            cp=request.cp, ep=request.ep, dp_replicate=replicate, dp_shard=shard, zero=request.zero_level(shard),
            micro_batch=request.micro_batch, recompute=request.recompute,
            schedule=request.schedule,
            offload_activations=request.offload_activations, offload_optimizer=request.offload_optimizer,
            sequence_parallel=request.sequence_parallel, compile=request.compile,
        ), chooser=chooser), cluster

    def answers(self, path: Path) -> Iterator[dict[str, Any]]:
        """One answer for each line of the file that is not blank: the simulated report, or {"error": why}."""
        try:
            content = path.read_bytes()
        except OSError as error:
            content, reason = b"", error.strerror or "not a file"
        else:
            reason = "not a text file" if b"\0" in content else ""
        if reason:
            raise InputError(f"{path}: cannot be read ({reason}); name a file with one JSON object a line")
        lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield self._answer(number, line)

    def _answer(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            try:
                values = json.loads(line.decode())
            except UnicodeDecodeError:
                raise InputError(f"line {number} is not UTF-8") from None
            except json.JSONDecodeError as error:
                raise InputError(f"line {number} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(values, dict):
                raise InputError(f"line {number} is not a JSON object")
            _, timeline = self.simulate(SimulateRequest.parse(values))
            return timeline.report()
        except AutoparError as error:
            return {"error": str(error)}
