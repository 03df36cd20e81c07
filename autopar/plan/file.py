"""The plan file: versioned JSON, checked by pydantic where it comes in, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from autopar.errors import InputError
from autopar.files import write_text
from autopar.plan.coverage import Coverage, TargetShare
from autopar.plan.plan import MOST_ROWS, Baseline, Certificate, Mesh, Plan, Recompute, Schedule, Stage, Variant
from autopar.sharding.rewrite import Rewrite, RewriteKind
from autopar.sharding.state import State
from autopar.sharding.strategy import ClassSharding, Strategy

FORMAT: Final = "autopar-plan"
VERSION: Final = 1
_AGAIN = "write it again with `autopar plan MODEL --cluster C --global-batch N -o plan.json`"

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Mesh(_Record):
    dp_replicate: Count = 1
    dp_shard: Count = 1
    tp: Count = 1
    cp: Count = 1
    ep: Count = 1


class _Variant(_Record):
    recompute: Recompute
    offload: bool = False
    layers: Count


class _Strategy(_Record):
    op: str
    factor: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    lowering: str = ""

    _states = field_validator("inputs", "outputs")(lambda states: _checked_states(states))


class _Sharding(_Record):
    cls: str
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    buffers: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[_Strategy, ...]
    axis: Annotated[str, Field(pattern="^(cp|tp)$")] = "tp"

    _states = field_validator("inputs", "params", "buffers", "outputs")(lambda states: _checked_states(states))


class _Stage(_Record):
    first: Index
    last: Index
    devices: tuple[Index, ...]
    mesh: _Mesh
    zero: Annotated[int, Field(ge=0, le=3)]
    recompute: Recompute
    virtual: Index = 0
    variants: tuple[_Variant, ...] = ()
    offload_optimizer: bool = False
    rows: tuple[Count, ...] = ()
    shardings: tuple[_Sharding, ...] = ()
    peak_memory_bytes: Amount | None = None
    memory_limit_bytes: Amount | None = None


class _Rewrite(_Record):
    kind: RewriteKind
    cls: str
    ops: Annotated[tuple[str, ...], Field(min_length=1)]


class _Certificate(_Record):
    upper_bound_s: Amount
    lower_bound_s: Amount
    searched: str
    not_searched: tuple[str, ...] = ()
    search_seconds: Amount = 0.0
    stopped_early: bool = False
    order_bound_s: Amount | None = None


class _Baseline(_Record):
    name: str
    step_time_s: Amount | None
    feasible: bool
    summary: str = ""


class _TargetShare(_Record):
    target: str
    time_share: Annotated[float, Field(ge=0, le=1)]


class _Coverage(_Record):
    num_ops: Index
    num_ruled: Index
    tp: Count = 1
    num_repeated: Index = 0
    without_rule: tuple[_TargetShare, ...] = ()
    repeated: tuple[_TargetShare, ...] = ()


class _PlanFile(_Record):
    format: Literal["autopar-plan"]
    version: Literal[1]
    model_name: str
    model_fingerprint: str
    cluster_name: str
    cluster_fingerprint: str
    num_devices: Count
    global_batch: Annotated[int, Field(ge=1, le=MOST_ROWS)]
    seq_len: Count | None
    dtype: str
    param_dtype: str
    optimizer: str
    micro_batch: Count
    num_micro_batches: Count
    schedule: Schedule
    sequence_parallel: bool
    compile: bool = False
    stages: Annotated[tuple[_Stage, ...], Field(min_length=1)]
    shardings: tuple[_Sharding, ...] = ()
    certificate: _Certificate | None = None
    baselines: tuple[_Baseline, ...] = ()
    notes: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    coverage: _Coverage | None = None
    rewrites: tuple[_Rewrite, ...] = ()
    actions: tuple[str, ...] = ()
    picture: dict[str, Any] | None = None  # what the plan's page shows; no part of the plan


def _checked_states(states: tuple[str, ...]) -> tuple[str, ...]:
    for text in states:
        State.parse(text)
    return states


def plan_to_json(plan: Plan, picture: Mapping[str, Any] | None = None) -> str:
    """The plan file's text: the same plan always gives the same text.

    `picture` is what `autopar viz` draws (autopar.viz.picture); it goes along at the end, in one line.
    """
    record = _PlanFile(
        format=FORMAT, version=VERSION, model_name=plan.model_name, model_fingerprint=plan.model_fingerprint,
        cluster_name=plan.cluster_name, cluster_fingerprint=plan.cluster_fingerprint, num_devices=plan.num_devices,
        global_batch=plan.global_batch, seq_len=plan.seq_len, dtype=plan.dtype, param_dtype=plan.param_dtype,
        optimizer=plan.optimizer, micro_batch=plan.micro_batch, num_micro_batches=plan.num_micro_batches,
        schedule=plan.schedule, sequence_parallel=plan.sequence_parallel, compile=plan.compile,
        stages=tuple(_stage_record(stage) for stage in plan.stages),
        shardings=tuple(_sharding_record(choice) for choice in plan.shardings),
        certificate=_certificate_record(plan.certificate),
        baselines=tuple(
            _Baseline(name=b.name, step_time_s=b.step_time_s, feasible=b.feasible, summary=b.summary)
            for b in plan.baselines
        ),
        notes=plan.notes, blocks=plan.blocks, coverage=_coverage_record(plan.coverage),
        rewrites=tuple(_Rewrite(kind=item.kind, cls=item.cls, ops=item.ops) for item in plan.rewrites),
        actions=plan.actions,
    )
    text = record.model_dump_json(indent=1, exclude={"picture"})
    if picture is not None:
        text = text.removesuffix("\n}") + ',\n "picture": ' + json.dumps(picture, separators=(",", ":")) + "\n}"
    return text + "\n"


def plan_from_json(text: str, *, source: str = "plan") -> Plan:
    """The plan that the text describes; InputError, one line that names `source`, for anything else."""
    return _plan(_record(text, source))


def picture_from_json(text: str, *, source: str = "plan") -> dict[str, Any] | None:
    """The picture that goes along with the plan, None where there is none; InputError as `plan_from_json`."""
    return _record(text, source).picture


def _record(text: str, source: str) -> _PlanFile:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        ended = error.pos >= len(text.rstrip()) or not text.rstrip().endswith("}")
        cut = " (the file ends too early)" if ended else ""
        raise InputError(
            f"{source}: not valid JSON at line {error.lineno}, column {error.colno}{cut}: {error.msg}; {_AGAIN}"
        ) from None
    except RecursionError:
        raise InputError(f"{source}: nested too deep to be a plan; {_AGAIN}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f'{source}: not an autopar plan (no "format": "{FORMAT}" at its top); {_AGAIN}')
    if document.get("version") != VERSION:
        raise InputError(
            f"{source}: plan format version {document.get('version')!r}, and this autopar reads version {VERSION}; "
            f"use the autopar that wrote it, or {_AGAIN}"
        )
    try:
        return _PlanFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise InputError(f"{source}: at {where}: {' '.join(first['msg'].split())}; correct it or {_AGAIN}") from None


def save_plan(plan: Plan, path: str | Path, picture: Mapping[str, Any] | None = None) -> None:
    """Write the plan file atomically: readers see the old file or the whole new one."""
    write_text(path, plan_to_json(plan, picture))


def load_plan(path: str | Path) -> Plan:
    """The plan in the file; InputError, one line that names the file, where it cannot be read."""
    return plan_from_json(_text(path), source=str(path))


def load_picture(path: str | Path) -> dict[str, Any] | None:
    """The picture in the plan file, None where it holds none; InputError as `load_plan`."""
    return picture_from_json(_text(path), source=str(path))


def _text(path: str | Path) -> str:
    source = Path(path)
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{source}: not a text file, so not an autopar plan; {_AGAIN}") from None
    except OSError as error:
        raise InputError(f"{source}: cannot read the plan: {error.strerror or error}; check the path") from None


def _stage_record(stage: Stage) -> _Stage:
    mesh = stage.mesh
    return _Stage(
        first=stage.first, last=stage.last, devices=stage.devices, zero=stage.zero, recompute=stage.recompute,
        virtual=stage.virtual, peak_memory_bytes=stage.peak_memory_bytes, memory_limit_bytes=stage.memory_limit_bytes,
        variants=tuple(
            _Variant(recompute=variant.recompute, offload=variant.offload, layers=count)
            for variant, count in stage.variants
        ),
        offload_optimizer=stage.offload_optimizer, rows=stage.rows,
        shardings=tuple(_sharding_record(choice) for choice in stage.shardings),
        mesh=_Mesh(dp_replicate=mesh.dp_replicate, dp_shard=mesh.dp_shard, tp=mesh.tp, cp=mesh.cp, ep=mesh.ep),
    )


def _texts(states: tuple[State, ...]) -> tuple[str, ...]:
    return tuple(str(state) for state in states)


def _parsed(texts: tuple[str, ...]) -> tuple[State, ...]:
    return tuple(State.parse(text) for text in texts)


def _sharding_record(choice: ClassSharding) -> _Sharding:
    return _Sharding(
        cls=choice.cls, inputs=_texts(choice.inputs), params=_texts(choice.params), buffers=_texts(choice.buffers),
        outputs=_texts(choice.outputs), axis=choice.axis,
        ops=tuple(
            _Strategy(
                op=name, factor=strategy.factor, inputs=_texts(strategy.inputs), outputs=_texts(strategy.outputs),
                lowering=strategy.lowering,
            )
            for name, strategy in choice.ops
        ),
    )


def _certificate_record(certificate: Certificate | None) -> _Certificate | None:
    if certificate is None:
        return None
    return _Certificate(
        upper_bound_s=certificate.upper_bound_s, lower_bound_s=certificate.lower_bound_s,
        searched=certificate.searched, not_searched=certificate.not_searched,
        search_seconds=certificate.search_seconds, stopped_early=certificate.stopped_early,
        order_bound_s=certificate.order_bound_s,
    )


def _coverage_record(coverage: Coverage | None) -> _Coverage | None:
    if coverage is None:
        return None
    return _Coverage(
        num_ops=coverage.num_ops, num_ruled=coverage.num_ruled, tp=coverage.tp, num_repeated=coverage.num_repeated,
        without_rule=_share_records(coverage.without_rule), repeated=_share_records(coverage.repeated),
    )


def _share_records(shares: tuple[TargetShare, ...]) -> tuple[_TargetShare, ...]:
    return tuple(_TargetShare(target=found.target, time_share=found.time_share) for found in shares)


def _coverage(record: _Coverage) -> Coverage:
    without_rule, repeated = (
        tuple(TargetShare(found.target, found.time_share) for found in shares)
        for shares in (record.without_rule, record.repeated)
    )
    return Coverage(**{**dict(record), "without_rule": without_rule, "repeated": repeated})


def _sharding(choice: _Sharding) -> ClassSharding:
    return ClassSharding(
        cls=choice.cls, inputs=_parsed(choice.inputs), params=_parsed(choice.params), buffers=_parsed(choice.buffers),
        outputs=_parsed(choice.outputs), axis=choice.axis,
        ops=tuple(
            (op.op, Strategy(factor=op.factor, inputs=_parsed(op.inputs), outputs=_parsed(op.outputs),
                             lowering=op.lowering))
            for op in choice.ops
        ),
    )


def _plan(record: _PlanFile) -> Plan:
    shared = ("format", "version", "stages", "shardings", "certificate", "baselines", "coverage", "rewrites", "picture")
    plain = {name: getattr(record, name) for name in _PlanFile.model_fields if name not in shared}
    certificate = record.certificate
    return Plan(
        **plain,
        stages=tuple(
            Stage(**{
                **dict(stage), "mesh": Mesh(**dict(stage.mesh)),
                "variants": tuple(
                    (Variant(recompute=item.recompute, offload=item.offload), item.layers) for item in stage.variants
                ),
                "shardings": tuple(_sharding(choice) for choice in stage.shardings),
            })
            for stage in record.stages
        ),
        shardings=tuple(_sharding(choice) for choice in record.shardings),
        certificate=None if certificate is None else Certificate(**dict(certificate)),
        baselines=tuple(Baseline(**dict(baseline)) for baseline in record.baselines),
        coverage=None if record.coverage is None else _coverage(record.coverage),
        rewrites=tuple(Rewrite(**dict(item)) for item in record.rewrites),
    )
