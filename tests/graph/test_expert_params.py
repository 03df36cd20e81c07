"""Which parameters hold experts, and why an expert axis cannot have them."""

from __future__ import annotations

from dataclasses import replace

from graph_models import gpt2
from mixtures import mixture

from autopar.graph.capture import capture
from autopar.graph.expert_params import expert_ops, expert_params, num_experts, unsplit_experts


def test_the_experts_of_a_layer() -> None:
    (cls,) = [cls for cls in mixture().classes if expert_ops(cls)]
    names = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    assert expert_params(cls) == {f"mlp.experts.{name}" for name in names}
    assert num_experts(cls, expert_ops(cls)[0]) == 8


def test_axes_that_can_have_them() -> None:
    assert [size for size in range(1, 10) if not unsplit_experts(mixture(), size)] == [1, 2, 4, 8]
    assert "8 experts" in unsplit_experts(mixture(), 3)


def test_models_that_have_none_for_it() -> None:
    model, batch = gpt2()
    assert "no experts" in unsplit_experts(capture(model, batch, tag_rows=True).graph, 2)
    (cls,) = [cls for cls in mixture().classes if expert_ops(cls)]
    blocks = [replace(block, params=mixture().blocks[1].params) if block.cls == cls.name else block
              for block in mixture().blocks]
    assert "several blocks use" in unsplit_experts(replace(mixture(), blocks=tuple(blocks)), 2)
