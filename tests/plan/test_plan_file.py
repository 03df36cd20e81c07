import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.part import ranges
from autopar.errors import InputError
from autopar.plan.coverage import Coverage, TargetShare
from autopar.plan.file import load_plan, plan_from_json, plan_to_json, save_plan
from autopar.plan.plan import Baseline, Certificate, Mesh, Plan, Recompute, Schedule, Stage, Variant
from autopar.plan.text import plan_json, plan_text, seconds
from autopar.plan.verify import problems
from autopar.sharding.state import RP, R, shard
from autopar.sharding.strategy import ClassSharding, Strategy

PLAN = Plan(
    model_name="toy", model_fingerprint="m" * 16, cluster_name="1x4xTOY", cluster_fingerprint="c" * 16, num_devices=4,
    global_batch=8, seq_len=None, dtype="bfloat16", param_dtype="float32", optimizer="adamw", micro_batch=1,
    num_micro_batches=4, schedule=Schedule.ONE_F_ONE_B, sequence_parallel=False,
    stages=(
        Stage(first=0, last=2, devices=(0, 1), mesh=Mesh(dp_shard=2), zero=3, recompute=Recompute.FULL,
              peak_memory_bytes=3e9, memory_limit_bytes=1.6e10),
        Stage(first=2, last=3, devices=(2, 3), mesh=Mesh(dp_shard=2), zero=3, recompute=Recompute.FULL),
    ),
    shardings=(ClassSharding(
        cls="layer", inputs=(R,), params=(shard(0), RP, shard(1, 3)), buffers=(), outputs=(R,),
        ops=(("op", Strategy(factor="n", inputs=(RP, shard(0)), outputs=(shard(2),), lowering="axis_random")),),
    ),),
    certificate=Certificate(
        upper_bound_s=1.1, lower_bound_s=1.0, searched="12 settings", not_searched=("chance",), order_bound_s=1.05,
    ),
    baselines=(Baseline(name="ddp", step_time_s=None, feasible=False, summary="does not fit in memory"),
               Baseline(name="fsdp", step_time_s=1.2, feasible=True, summary="zero 3")),
    notes=("a note",), blocks=("prologue", "layers.0", "epilogue"),
    coverage=Coverage(
        num_ops=9, num_ruled=8, tp=2, num_repeated=2, without_rule=(TargetShare("my.op.default", 0.125),),
        repeated=(TargetShare("aten.add.Tensor", 0.0625), TargetShare("aten.mul.Tensor", 0.03125)),
    ),
    actions=tuple(
        ",".join([f"{stage}F{i}" for i in range(4)] + [f"{stage}B{i}" for i in range(4)]) for stage in range(2)
    ),
)
TEXT = plan_to_json(PLAN)


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    assert plan_from_json(TEXT) == PLAN
    path = tmp_path / "plan.json"
    path.write_text("old")
    PLAN.save(path)
    assert load_plan(path) == PLAN
    assert load_plan(path).stages[0].peak_memory_bytes == 3e9
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


VARIED = dataclasses.replace(
    PLAN, blocks=("prologue", *(f"layers.{i}" for i in range(6)), "epilogue"), stages=(
        Stage(first=0, last=6, devices=(0, 1), mesh=Mesh(dp_shard=2), zero=3, recompute=Recompute.NONE,
              offload_optimizer=True).with_variants([
                  Variant(recompute=Recompute.FULL, offload=True), Variant(recompute=Recompute.FULL),
                  Variant(recompute=Recompute.SELECTIVE), Variant(), Variant(),
              ]),
        Stage(first=6, last=8, devices=(2, 3), mesh=Mesh(dp_shard=2), zero=3, recompute=Recompute.NONE)
        .with_variants([Variant(recompute=Recompute.SELECTIVE)]),
    ),
)


def test_variants_of_layers_come_back_and_are_shown() -> None:
    assert plan_from_json(plan_to_json(VARIED)) == VARIED
    assert list(problems(VARIED, None)) == []
    text = " ".join(plan_text(VARIED, width=200).split())
    assert "1 full, offloaded, 1 full, 1 selective, 2 none; optimizer offloaded" in text
    stages = plan_json(VARIED, {})["stages"]
    assert [stage["recompute"] for stage in stages] == ["mixed", "selective"]
    assert stages[0]["recompute_layers"] == {"none": 2, "selective": 1, "full": 2}
    assert stages[1]["recompute_layers"] == {"none": 0, "selective": 1, "full": 0}
    assert [(stage["offload_layers"], stage["offload_optimizer"]) for stage in stages] == [(1, True), (0, False)]


def test_rows_and_shardings_of_a_stage_come_back() -> None:
    first = dataclasses.replace(PLAN.stages[0], rows=(1, 3), shardings=PLAN.shardings)
    plan = dataclasses.replace(PLAN, stages=(first, PLAN.stages[1]))
    assert plan_from_json(plan_to_json(plan)) == plan
    document = json.loads(TEXT)  # as plans were written before stages had them
    for stage in document["stages"]:
        del stage["rows"], stage["shardings"]
    assert plan_from_json(json.dumps(document)) == PLAN


def test_a_file_without_variants_is_read() -> None:
    """As plans were written before layers had variants."""
    document = json.loads(TEXT)
    for stage in document["stages"]:
        del stage["variants"], stage["offload_optimizer"]
    assert plan_from_json(json.dumps(document)) == PLAN


def test_counts_of_variants_must_add_up() -> None:
    stage = dataclasses.replace(VARIED.stages[0], variants=VARIED.stages[0].variants[:2])
    wrong = dataclasses.replace(VARIED, stages=(stage, VARIED.stages[1]))
    assert list(problems(wrong, None)) == ["the variants of stage 0 are counts of 2 layers, and it has 5"]
    zero = plan_to_json(VARIED).replace('"layers": 2', '"layers": 0')
    with pytest.raises(InputError, match=r"at stages\.0\.variants\.3\.layers"):
        plan_from_json(zero)


@given(st.integers(0, len(TEXT.rstrip()) - 1))
def test_a_truncated_file_is_one_clear_line(length: int) -> None:
    with pytest.raises(InputError, match=r"^p\.json: ") as caught:
        plan_from_json(TEXT[:length], source="p.json")
    assert "\n" not in str(caught.value)
    assert "ends too early" in str(caught.value)
    assert "autopar plan" in str(caught.value)


def broken(**changes: object) -> str:
    return json.dumps({**json.loads(TEXT), **changes})


@pytest.mark.parametrize(("text", "message"), [
    ("[1, 2]", "not an autopar plan"),
    ('{"format": "torchtitan"}', "not an autopar plan"),
    ("{'format': 1}", "line 1, column 2"),
    (broken(version=7), "version 7"),
    (broken(global_batch="eight"), "at global_batch"),
    (broken(global_batch=0), "at global_batch"),
    (broken(surprise=1), "at surprise"),
    (broken(stages=[]), "at stages"),
    (broken(schedule="2f2b"), "at schedule"),
    (TEXT.replace('"S(1,3)"', '"T(1,3)"'), "not a sharding state"),
    (TEXT.replace('"zero":3', '"zero":4').replace('"zero": 3', '"zero": 4'), r"at stages\.0\.zero"),
    (TEXT.replace("1.1,", "NaN,"), "upper_bound_s|not valid JSON"),
    ("[" * 100_000, "nested too deep|not valid JSON"),
])
def test_broken_files_say_where(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan_from_json(text, source="p.json")
    assert str(caught.value).startswith("p.json: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary"):
        with pytest.raises(InputError, match=path.name):
            load_plan(path)
    with pytest.raises(InputError, match="nowhere"):
        save_plan(PLAN, tmp_path / "nowhere" / "plan.json")


REPORT = {
    "step_time_s": 1.1, "tokens_per_s_per_device": 100.0, "mfu": 0.4, "bubble_fraction": 0.1, "feasible": True,
    "infeasible_reason": None, "breakdown_s": {"compute": 1.0, "bubble": 0.1, "tp_comm": 0.0},
    "devices": [
        {"rank": r, "type": "TOY", "stage": r // 2, "peak_memory_gib": 2.0, "memory_gib": {}} for r in range(4)
    ],
    "notes": ["simulated"],
}


def test_the_printed_plan_names_its_parts() -> None:
    for text in (str(PLAN), plan_text(PLAN, REPORT)):
        for part in ("prologue .. layers.0 (2)", "epilogue", "dp_shard 2", "2.8 / 14.9", "gap 10.0%", "chance",
                     "does not fit in memory", "1.09x", "a note", "sharding rules: 8 of 9 ops", "my.op.default 12.5%"):
            assert part in text
    assert "MFU 40.0%" in plan_text(PLAN, REPORT)
    assert "2.0 / -" in plan_text(PLAN, REPORT)
    assert "blocks 0-1" in str(dataclasses.replace(PLAN, blocks=()))


def test_json_keys() -> None:
    value = plan_json(PLAN, REPORT)
    assert json.loads(json.dumps(value)) == value
    assert value["stages"][0]["layers"] == [0, 1]
    assert value["stages"][1]["devices"] == [2, 3]
    assert value["stages"][0]["mesh"]["dp_shard"] == 2
    assert (value["lower_bound_s"], value["step_time_s"]) == (1.0, 1.1)
    assert value["gap"] == pytest.approx(0.1)
    assert [b["name"] for b in value["baselines"]] == ["ddp", "fsdp"]
    assert value["coverage"]["without_rule"] == [{"target": "my.op.default", "time_share": 0.125}]
    assert value["coverage"]["repeated_time_share"] == 0.09375
    assert plan_json(dataclasses.replace(PLAN, coverage=None), REPORT)["coverage"] is None


def test_small_words() -> None:
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert [seconds(t) for t in (12.3456, 0.0123, 4.5e-5)] == ["12.35 s", "12.3 ms", "45 us"]
