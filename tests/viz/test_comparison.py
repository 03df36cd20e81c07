"""Two plans side by side: what differs is named, what it gains is counted, and the same plan differs in nothing."""

from dataclasses import replace

import pytest
from drawn_page import Drawn

from autopar.errors import InputError
from autopar.plan.file import load_picture, load_plan
from autopar.viz.comparison import comparison

NAMES = ("a", "b")


def both(drawn: Drawn) -> tuple:
    plans = load_plan(drawn.plan), load_plan(drawn.other_plan)
    return plans, (load_picture(drawn.plan), load_picture(drawn.other_plan))


def test_a_plan_is_as_fast_as_itself(drawn: Drawn) -> None:
    plan = load_plan(drawn.plan)
    found = comparison((plan, plan), (drawn.picture, drawn.picture), NAMES)
    assert found["gains"] == [pytest.approx(found["gains"][0])] and "as fast" in found["gains"][0]
    assert (found["settings"], found["splits"], found["collectives"], found["ranks"]) == ([], [], [], [])
    assert not any(run["moved"] or run["reshaped"] for run in found["blocks"])
    assert all(row["values"][0] == row["values"][1] for row in (*found["numbers"], *found["parts"]))


def test_the_gain_is_the_ratio_of_the_steps(drawn: Drawn) -> None:
    plans, pictures = both(drawn)
    found = comparison(plans, pictures, NAMES)
    steps = [picture["numbers"]["step_time_s"] for picture in pictures]
    assert f"{max(steps) / min(steps):.2f}x {'faster' if steps[1] < steps[0] else 'slower'}" in found["gains"][0]
    for i in (0, 1):
        assert sum(row["values"][i] for row in found["parts"]) == pytest.approx(steps[i])


def test_every_block_has_its_stage_in_both_plans(drawn: Drawn) -> None:
    plans, pictures = both(drawn)
    found = comparison(plans, pictures, NAMES)
    for i, plan in enumerate(plans):
        homes = [run["stages"][i] for run in found["blocks"] for _ in range(run["count"])]
        assert homes == [j for j, stage in enumerate(plan.stages) for _ in range(stage.first, stage.last)]
    assert all(run["moved"] for run in found["blocks"])  # two stages against one: each block has other devices
    assert found["ranks"] == [{"ranks": "4-7", "stages": [[1], [0]]}]


def test_ops_split_otherwise_are_named_by_their_module(drawn: Drawn) -> None:
    plans, pictures = both(drawn)
    found = comparison(plans, pictures, NAMES)
    split = {row["module"]: row["values"] for row in found["splits"]}
    assert split["mlp.down_proj"][0].startswith(("tp 2: ", "cp 2: ")) and split["mlp.down_proj"][1] == ""
    assert {row["axis"] for row in found["collectives"]} <= {"tp", "cp"}
    assert all(row["counts"][0] > 0 and row["counts"][1] == 0 for row in found["collectives"])


def test_without_pictures_the_certificates_times_are_compared(drawn: Drawn) -> None:
    plans, _ = both(drawn)
    found = comparison(plans, (None, None), NAMES)
    (steps,) = (row["values"] for row in found["numbers"] if row["key"] == "step_time_s")
    assert steps == [plan.certificate.upper_bound_s for plan in plans]
    assert found["parts"] == [] and found["gains"]


def test_steps_of_unlike_size_are_compared_by_their_tokens(drawn: Drawn) -> None:
    plan = load_plan(drawn.plan)
    twice = replace(plan, global_batch=2 * plan.global_batch, num_micro_batches=2 * plan.num_micro_batches)
    found = comparison((plan, twice), (drawn.picture, drawn.picture), NAMES)
    assert "b is 2.00x faster" in found["gains"][0] and "differ in size" in found["gains"][0]
    assert ["global batch", 32, 64] in found["settings"]


def test_plans_of_two_models_are_refused(drawn: Drawn) -> None:
    plan = load_plan(drawn.plan)
    with pytest.raises(InputError, match="one model"):
        comparison((plan, replace(plan, model_name="other")), (None, None), NAMES)
