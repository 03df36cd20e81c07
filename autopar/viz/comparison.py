"""Two plans of one model side by side, as plain JSON values: what differs, what moved, what it gains.

Every pair of values is [of the first plan, of the second]. Step times come from the pictures that go along with plan
files, or else from the certificates; what only pictures know (the parts of the step, the ops' modules, collectives)
is left out where one of the two is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import Any

from autopar.cluster.part import ranges
from autopar.errors import InputError
from autopar.plan.plan import Plan, Stage
from autopar.plan.sketch import PARTS
from autopar.plan.text import mesh_text, recompute_text, seconds
from autopar.sharding.joint import factor_text

Picture = Mapping[str, Any]
Pictures = tuple[Picture | None, Picture | None]

_NEGLIGIBLE = 0.005  # of the step: smaller changes of a part are not put in words


def comparison(plans: tuple[Plan, Plan], pictures: Pictures, names: tuple[str, str]) -> dict[str, Any]:
    """The comparison of two plans; `names` are what to call them. InputError where they are not of one model."""
    one, other = plans
    if one.model_name != other.model_name or one.blocks != other.blocks:
        raise InputError(
            f"{names[0]} is a plan for {one.model_name} of {len(one.blocks)} blocks and {names[1]} for "
            f"{other.model_name} of {len(other.blocks)}: only plans of one model can be compared"
        )
    both = pictures[0] is not None and pictures[1] is not None
    found: dict[str, Any] = {
        "names": list(names),
        "settings": _settings(plans),
        "numbers": _numbers(plans, pictures),
        "parts": _parts(pictures),
        "stages": [list(pair) for pair in zip_longest(*([_stage(plan, s) for s in plan.stages] for plan in plans))],
        "blocks": _blocks(plans),
        "ranks": _ranks(plans),
        "splits": _splits(plans, pictures),
        "collectives": _collectives(pictures) if both else [],
    }
    return found | {"gains": _gains(plans, found)}


def _settings(plans: tuple[Plan, Plan]) -> list[list[Any]]:
    """[name, first, second] of the settings that differ."""
    words = (
        ("cluster", "cluster_name"), ("devices", "num_devices"), ("global batch", "global_batch"),
        ("sequence", "seq_len"), ("micro-batch", "micro_batch"), ("micro-batches", "num_micro_batches"),
        ("schedule", "schedule"), ("compute dtype", "dtype"), ("parameter dtype", "param_dtype"),
        ("optimizer", "optimizer"), ("sequence parallel", "sequence_parallel"), ("compiled", "compile"),
        ("stages", "num_stages"),
    )
    rows = [[name, *(getattr(plan, field) for plan in plans)] for name, field in words]
    rows.append(["own order of actions", *(bool(plan.actions) for plan in plans)])
    return [[name, _plain(a), _plain(b)] for name, a, b in rows if a != b]


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, int) else str(value)


def _numbers(plans: tuple[Plan, Plan], pictures: Pictures) -> list[dict[str, Any]]:
    """What is better when more, or less, of each plan; None where it is not known."""
    steps = [_step_s(plan, picture) for plan, picture in zip(plans, pictures, strict=True)]
    tokens = [
        plan.global_batch * (plan.seq_len or 1) / step if step else None
        for plan, step in zip(plans, steps, strict=True)
    ]
    unit = "tokens/s" if plans[0].seq_len else "rows/s"

    def drawn(key: str) -> list[Any]:
        return [None if picture is None else picture["numbers"][key] for picture in pictures]

    rows = (
        ("step_time_s", "step time", "seconds", "less", steps),
        ("tokens_per_s", unit, "rate", "more", tokens),
        ("tokens_per_s_per_device", f"{unit} a device", "rate", "more",
         [rate / plan.num_devices if rate else None for plan, rate in zip(plans, tokens, strict=True)]),
        ("mfu", "MFU", "share", "more", drawn("mfu")),
        ("bubble_fraction", "bubble", "share", "less", drawn("bubble_fraction")),
        ("memory_share", "memory of the fullest device", "share", "less", [_fullest(plan) for plan in plans]),
        ("lower_bound_s", "proved lower bound", "seconds", "less", [
            plan.certificate.lower_bound_s or None if plan.certificate else None for plan in plans
        ]),
    )
    return [
        {"key": key, "name": name, "kind": kind, "better": better, "values": values}
        for key, name, kind, better, values in rows if values != [None, None]
    ]


def _step_s(plan: Plan, picture: Picture | None) -> float | None:
    if picture is not None:
        step: float = picture["numbers"]["step_time_s"]
        return step
    return plan.certificate.upper_bound_s if plan.certificate is not None else None


def _fullest(plan: Plan) -> float | None:
    """The share of its limit that the fullest device needs at its peak."""
    shares = [
        stage.peak_memory_bytes / stage.memory_limit_bytes
        for stage in plan.stages if stage.peak_memory_bytes is not None and stage.memory_limit_bytes
    ]
    return max(shares, default=None)


def _parts(pictures: Pictures) -> list[dict[str, Any]]:
    one, other = pictures
    if one is None or other is None:
        return []
    return [
        {"part": part, "name": name, "values": [one["breakdown_s"][part], other["breakdown_s"][part]]}
        for part, name in PARTS.items() if one["breakdown_s"][part] or other["breakdown_s"][part]
    ]


def _stage(plan: Plan, stage: Stage) -> dict[str, Any]:
    return {
        "blocks": _span(plan.blocks[stage.first : stage.last]) or f"{stage.first}-{stage.last - 1}",
        "ranks": ranges(stage.devices), "num_devices": len(stage.devices), "mesh": mesh_text(stage.mesh),
        "zero": stage.zero, "recompute": recompute_text(stage),
        "peak_memory_gib": stage.peak_memory_bytes / 2**30 if stage.peak_memory_bytes is not None else None,
    }


def _span(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{names[0]} .. {names[-1]} ({len(names)})"


def _blocks(plans: tuple[Plan, Plan]) -> list[dict[str, Any]]:
    """Runs of neighbouring blocks with the same stages in both plans, and whether their devices are others."""
    homes = [_homes(plan) for plan in plans]
    found = []
    for (a, b), run in groupby(enumerate(plans[0].blocks), key=lambda item: (homes[0][item[0]], homes[1][item[0]])):
        names = [name for _, name in run]
        stages = plans[0].stages[a], plans[1].stages[b]
        found.append({
            "first": names[0], "last": names[-1], "count": len(names), "stages": [a, b],
            "ranks": [ranges(stage.devices) for stage in stages],
            "meshes": [mesh_text(stage.mesh) for stage in stages],
            "moved": stages[0].devices != stages[1].devices, "reshaped": stages[0].mesh != stages[1].mesh,
        })
    return found


def _homes(plan: Plan) -> list[int]:
    """The stage of each block."""
    return [i for i, stage in enumerate(plan.stages) for _ in range(stage.first, stage.last)]


def _ranks(plans: tuple[Plan, Plan]) -> list[dict[str, Any]]:
    """Runs of ranks with the same stages in both plans, those alone whose stages differ."""
    homes: list[dict[int, tuple[int, ...]]] = []
    for plan in plans:
        own: dict[int, tuple[int, ...]] = {}
        for i, stage in enumerate(plan.stages):
            for rank in stage.devices:
                own[rank] = (*own.get(rank, ()), i)
        homes.append(own)
    ranks = range(max(plan.num_devices for plan in plans))
    pairs = ((rank, (homes[0].get(rank, ()), homes[1].get(rank, ()))) for rank in ranks)
    return [
        {"ranks": ranges(tuple(rank for rank, _ in run)), "stages": [list(a), list(b)]}
        for (a, b), run in groupby(pairs, key=lambda item: item[1]) if a != b
    ]


def _splits(plans: tuple[Plan, Plan], pictures: Pictures) -> list[dict[str, Any]]:
    """Ops that are split otherwise, by block class: axis and factor in each plan."""
    modules = _modules(pictures)
    factors = [_factors(plan) for plan in plans]
    found = []
    for cls, op in dict.fromkeys((*factors[0], *factors[1])):
        a, b = (own.get((cls, op), "") for own in factors)
        if a != b:
            found.append({"cls": cls, "op": op, "module": modules.get((cls, op), ""), "values": [a, b]})
    return found


def _factors(plan: Plan) -> dict[tuple[str, str], str]:
    """How each op is split, by class and op, where it is: "tp 4: n", or what each stage does where they differ."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for stage in plan.stages:
        for axis, size in stage.mesh.inner:
            for choice in stage.shardings or plan.shardings:
                if choice.axis == axis:
                    for op, strategy in choice.ops:
                        if strategy.factor:
                            split = f"{axis} {size}: {factor_text(strategy.factor)}"
                            found.setdefault((choice.cls, op), {})[split] = None
    return {key: ", ".join(words) for key, words in found.items()}


def _modules(pictures: Pictures) -> dict[tuple[str, str], str]:
    """The model's own name of what each op belongs to, by class and op."""
    return {
        (entry["cls"], op["name"]): op["module"] or op["target"]
        for picture in pictures if picture is not None for entry in picture["classes"] for op in entry["ops"]
    }


def _collectives(pictures: Iterable[Picture | None]) -> list[dict[str, Any]]:
    """Collectives inside one block of each class, forward and backward: how many and how many bytes."""
    totals: list[Counter[tuple[str, str, str]]] = []
    counts: list[Counter[tuple[str, str, str]]] = []
    for picture in pictures:
        assert picture is not None
        size, count = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
        seen: set[str] = set()
        for entry in picture["classes"]:
            if entry["cls"] in seen:  # stages that run a class otherwise have an entry of their own
                continue
            seen.add(entry["cls"])
            for item in entry["collectives"]:
                key = (entry["cls"], item["collective"], item["axis"])
                size[key] += item["size_bytes"]
                count[key] += 1
        totals.append(size)
        counts.append(count)
    return [
        {"cls": cls, "collective": name, "axis": axis, "counts": [own[cls, name, axis] for own in counts],
         "size_bytes": [own[cls, name, axis] for own in totals]}
        for cls, name, axis in sorted({*totals[0], *totals[1]})
        if any(own[0][cls, name, axis] != own[1][cls, name, axis] for own in (totals, counts))
    ]


def _gains(plans: tuple[Plan, Plan], found: Mapping[str, Any]) -> list[str]:
    """What the second plan gains or loses against the first, in words."""
    one, other = found["names"]
    values = {row["key"]: row["values"] for row in found["numbers"]}
    words: list[str] = []
    same_work = all(getattr(plans[0], key) == getattr(plans[1], key) for key in ("global_batch", "seq_len"))
    key = "step_time_s" if same_work else "tokens_per_s"
    pair = values.get(key, [None, None])
    if pair[0] and pair[1]:
        ratio = pair[0] / pair[1] if same_work else pair[1] / pair[0]
        verdict = "as fast" if abs(ratio - 1) < 0.0005 else f"{max(ratio, 1 / ratio):.2f}x " + (
            "faster" if ratio > 1 else "slower")
        steps = values["step_time_s"]
        words.append(
            f"{other} is {verdict}: a step takes {seconds(steps[1])}, that of {one} {seconds(steps[0])}" + (
                "" if same_work else f"; their steps differ in size, and tokens/s are {pair[1]:,.0f} and {pair[0]:,.0f}"
            )
        )
    if same_work and found["parts"]:
        least = _NEGLIGIBLE * max(values["step_time_s"])
        changes = [(row["values"][1] - row["values"][0], row["name"]) for row in found["parts"]]
        told = [
            f"{'+' if change > 0 else '-'}{seconds(abs(change))} {name}"
            for change, name in sorted(changes, key=lambda item: -abs(item[0])) if abs(change) >= least
        ]
        if told:
            words.append("of the step: " + ", ".join(told))
    full = values.get("memory_share", [None, None])
    if full[0] and full[1] and abs(full[1] - full[0]) >= 0.005:
        words.append(f"the fullest device is {full[1]:.0%} full, with {one} {full[0]:.0%}")
    moved = sum(row["count"] for row in found["blocks"] if row["moved"])
    reshaped = sum(row["count"] for row in found["blocks"] if row["reshaped"] and not row["moved"])
    total = len(plans[0].blocks)
    if moved or reshaped:
        words.append(
            f"of {total} blocks {moved} lie on other devices"
            + (f", {reshaped} more are shared out otherwise on the same ones" if reshaped else "")
        )
    return words or [f"{other} does the same as {one}"]
