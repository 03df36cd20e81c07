"""Networks of images whose hidden states pass between blocks as parts of their height, against one process."""

from __future__ import annotations

from dataclasses import replace

import networks
import pytest
import torch
from all_entries import ENTRIES
from entry import ROWS, Entry
from harness import DTYPE, captured
from local_machines import slow_cluster
from torch import Tensor

from autopar.graph.model_graph import BlockClass
from autopar.plan.plan import Plan
from autopar.runtime.engine import Trainer
from autopar.runtime.local import LocalPool
from autopar.runtime.parity import capture_for, compare
from autopar.search import shardings
from autopar.search.degrees import Degrees, plan_from_degrees
from autopar.sharding.lowering import Lowering
from autopar.sharding.propagate import ClassStrategies, class_strategies
from autopar.sharding.state import shard

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]
IMAGES = [entry for entry in ENTRIES if entry.name in ("conv-classifier", "u-net")]


def image_plan(entry: Entry, monkeypatch: pytest.MonkeyPatch, *, by_height: bool) -> Plan:
    """A plan with images in parts of their height between blocks and no channels split inside, or with whole images."""
    if by_height:
        monkeypatch.setattr(shardings, "class_strategies", without_channels)
    wanted = Degrees(
        global_batch=ROWS, micro_batch=ROWS, tp=2, dtype=DTYPE, param_dtype=DTYPE, optimizer="sgd",
        sequence_parallel=by_height,
    )
    return plan_from_degrees(captured(entry).graph, slow_cluster(2), wanted)


def without_channels(cls: BlockClass, size: int) -> ClassStrategies:
    """What there is to choose from, less the splits of channels by convolutions and batch norms."""
    found = class_strategies(cls, size)
    kept = dict(found.strategies)
    for op in cls.ops:
        if "conv" in op.target or "batch_norm" in op.target:
            kept[op.name] = tuple(s for s in kept[op.name] if s.factor not in ("c", "i", "o"))
    return replace(found, strategies=kept)


@pytest.mark.parametrize("entry", IMAGES, ids=str)
def test_images_in_parts_of_their_height(
    entry: Entry, pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = image_plan(entry, monkeypatch, by_height=True)
    passed = [state for choice in plan.shardings for state in (*choice.inputs, *choice.outputs)]
    lowerings = {strategy.lowering for choice in plan.shardings for _, strategy in choice.ops}
    assert shard(2) in passed
    assert {Lowering.SPATIAL_HALO, Lowering.SYNC_BATCH_NORM} <= lowerings
    report = compare(entry.build, plan, steps=2, pool=pool)
    assert report.passed, f"loss {report.loss_error:.1e}, worst {report.worst}"


def running_statistics(plan: Plan) -> dict[str, Tensor]:
    """The running statistics of a plan after one step."""
    found = capture_for(networks.conv_classifier, DTYPE)
    torch.manual_seed(0)
    model, batch, _ = networks.conv_classifier()
    trainer = Trainer(model.double(), plan, found, lambda params: torch.optim.SGD(params, lr=0.1))
    trainer.forward_backward({**batch, "image": batch["image"].double()})
    kept = {
        name: value.detach().clone() for stage in trainer.stages for name, value in stage.module.named_buffers()
    }
    trainer.close()
    return kept


@pytest.mark.parametrize("by_height", [False, True])
def test_running_statistics_are_those_of_one_process(
    pool: LocalPool, by_height: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = image_plan(IMAGES[0], monkeypatch, by_height=by_height)
    wanted = Lowering.SYNC_BATCH_NORM if by_height else Lowering.CHANNEL_STATISTICS
    assert wanted in {strategy.lowering for choice in plan.shardings for _, strategy in choice.ops}
    torch.manual_seed(0)
    model, batch, _ = networks.conv_classifier()
    model.double()(batch["image"].double(), batch["labels"])
    expected = {name: value for name, value in model.named_buffers() if "running" in name}
    assert expected
    for found in pool.run(running_statistics, plan, num_ranks=2):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
