"""What parts of the positions borrow of their neighbours, and which positions cannot be cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import rank_programs
import torch
from sampling import Pick
from shard_compare import Sample, build, check

from autopar.sharding.lowering import Lowering
from autopar.sharding.rules import refusals, strategies
from autopar.sharding.rules.windows import Halo, halo_of

pick = Pick(0)


def _conv(length: int, window: int, stride: int, padding: int, dilation: int = 1) -> Sample:
    args = (pick.x(2, 2, length), pick.x(2, 2, window), None, [stride], [padding], [dilation])
    return Sample("aten.conv1d.default", args)


def _halo(sample: Sample, size: int) -> Halo | None:
    built = build(sample)
    chosen = next(s for s in strategies(built.op, built.tensors, size) if s.factor == "x0")
    return halo_of(built.op, chosen, built.tensors, size) if chosen.lowering else None


@pytest.mark.parametrize(
    ("sample", "borders"),
    [
        (_conv(12, 3, 1, 1), (1, 1)),
        (_conv(12, 3, 2, 1), (1, 0)),
        (_conv(12, 7, 2, 3), (3, 2)),
        (_conv(12, 3, 1, 2, 2), (2, 2)),
        (_conv(12, 2, 2, 0), None),  # windows side by side
        (_conv(12, 1, 2, 0), None),
    ],
)
def test_the_borders_that_a_convolution_needs(sample: Sample, borders: tuple[int, int] | None) -> None:
    halo = _halo(sample, 2)
    assert (None if halo is None else (halo.before, halo.after)) == borders


_IMAGE = pick.x(2, 2, 8, 8)


@pytest.mark.parametrize(
    ("target", "args", "factor", "words"),
    [
        ("conv1d.default", _conv(8, 3, 1, 0).args, "x0", "8 of them do not become 6"),
        ("conv1d.default", _conv(9, 3, 2, 1).args, "x0", "9 of them do not become 5"),
        ("conv1d.default", _conv(6, 3, 2, 1).args, "x0", "size 3 does not divide by 2"),
        ("conv1d.default", _conv(4, 7, 1, 3).args, "x0", "a part of 2 is shorter than the 3 that"),
        ("conv2d.padding", (_IMAGE, pick.x(2, 2, 2, 2), None, [1, 1], "same"), "x0", "differs at the two ends"),
        ("avg_pool2d.default", (_IMAGE, [3, 3], [1, 1], [1, 1], False, False), "x1", "fewer at the ends"),
        ("avg_pool2d.default", (_IMAGE, [2, 2], [2, 2], [0, 0], True), "x0", "may be shorter"),
        ("max_pool2d_with_indices.default", (_IMAGE, [2, 2]), "x0", "indices"),
        ("adaptive_avg_pool2d.default", (_IMAGE, [3, 1]), "x0", "differ in length"),
        ("upsample_bilinear2d.vec", (_IMAGE, [16, 16], True, None), "x0", "corners"),
        ("upsample_nearest2d.vec", (_IMAGE, [12, 16], None), "x0", "8 positions become 12"),
        ("upsample_nearest2d.default", (_IMAGE, [16, 16], 2.1, 2.0), "x0", "not the ratio"),
        ("upsample_nearest2d.vec", (_IMAGE, [72, 16], None), "x0", "from afar"),
    ],
)
def test_positions_that_cannot_be_cut_are_refused(target: str, args: tuple[Any, ...], factor: str, words: str) -> None:
    built = build(Sample(f"aten.{target}", args))
    reasons = {refusal.factor: refusal.reason for refusal in refusals(built.op, built.tensors, 2)}
    assert words in reasons[factor]
    assert all(s.factor != factor for s in strategies(built.op, built.tensors, 2))


def test_indices_that_nobody_reads_do_not_keep_positions_whole() -> None:
    built = build(Sample("aten.max_pool2d_with_indices.default", (_IMAGE, [2, 2])))
    unread = replace(built.op, outputs=(built.op.outputs[0], ""))
    assert "x0" in {s.factor for s in strategies(unread, built.tensors, 2)}


@pytest.mark.parametrize("factor", range(1, 9))
@pytest.mark.parametrize("name", ["upsample_nearest1d", "_upsample_nearest_exact1d"])
def test_the_nearest_position_is_the_one_above(name: str, factor: int) -> None:
    """What lets positions be cut without a border: torch's rounding takes o // factor at any offset."""
    x = torch.arange(4096, dtype=torch.float64).view(1, 1, -1)
    for scales in ((), (float(factor),)):
        made = getattr(torch.ops.aten, name).default(x, [4096 * factor], *scales)
        assert torch.equal(made, x.repeat_interleave(factor, dim=2))


@pytest.mark.parametrize("wrong", [{"before": 0, "skip": 0}, {"fill": "lowest"}, {"after": 0}])
def test_the_comparison_finds_a_wrong_halo(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    built = build(_conv(12, 3, 1, 1))
    chosen = next(s for s in strategies(built.op, built.tensors, 2) if s.lowering == Lowering.SPATIAL_HALO)
    check(built, chosen, 2)
    monkeypatch.setattr(rank_programs, "halo_of", lambda *given: replace(halo_of(*given), **wrong))
    with pytest.raises((AssertionError, RuntimeError)):
        check(built, chosen, 2)
