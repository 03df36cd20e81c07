"""Bytes a parameter under ZeRO, mixed precision and each optimizer."""

from __future__ import annotations

import pytest

from autopar.cluster.tables import device_type
from autopar.cost_models.memory import (
    backward_bytes,
    check_optimizer,
    optimizer_step_bytes,
    reduction_bytes,
    static_bytes,
    step_temporary_bytes,
    workspace_bytes,
)
from autopar.errors import InputError

N = 1000.0


def per_parameter(zero: int, shards: int, dtype: str = "bfloat16", optimizer: str = "adamw") -> tuple[float, ...]:
    held = static_bytes(
        N, zero=zero, num_shards=shards, dtype=dtype, param_dtype="float32", optimizer=optimizer, unit_numel=0,
        root_numel=0,
    )
    return held.parameters / N, held.gradients / N, held.optimizer / N


@pytest.mark.parametrize(
    ("zero", "shards", "expected"),
    [
        (0, 1, (6, 4, 8)),  # master 4 and compute copy 2, gradient 4, two moments
        (1, 8, (2 + 4 / 8, 4, 1)),
        (2, 8, (2 + 4 / 8, 4 / 8, 1)),
        (3, 8, (4 / 8, 4 / 8, 1)),
        (3, 1, (4, 4, 8)),
    ],
)
def test_adamw_in_bfloat16(zero: int, shards: int, expected: tuple[float, ...]) -> None:
    assert per_parameter(zero, shards) == expected


def test_states_and_gradients_are_in_the_dtype_of_parameters_at_rest() -> None:
    held = static_bytes(
        N, zero=0, num_shards=1, dtype="bfloat16", param_dtype="bfloat16", optimizer="adamw", unit_numel=0,
        root_numel=0,
    )
    assert (held.parameters, held.gradients, held.optimizer) == (2 * N, 2 * N, 4 * N)


@pytest.mark.parametrize(("zero", "is_layer", "expected"), [
    (0, True, (2, 2 + 4, 4, 4, 4)),  # the gradient in bfloat16 and in float32, beside the copy
    (0, False, (2, 2 + 4, 4, 4, 4)),
    (1, True, (2, 4 + 1, 1, 1, 1)),  # the copy goes before what is sent and the shard come, beside bfloat16
    (2, True, (2, 4 + 1, 1, 1, 1)),
    (3, True, (0, 2 + 4 + 1, 1, 1, 1)),  # gathered units are buffers
    (3, False, (2, 2, 2, 2 + 4 + 1, 1)),  # reduced when all else is over
])
def test_bytes_of_the_only_backward(zero: int, is_layer: bool, expected: tuple[float, ...]) -> None:
    """The copy, gradients as they are made and from then on, in the reduction at the end, and after it."""
    found = backward_bytes(
        zero=zero, num_shards=4, num_copies=1, dtype="bfloat16", param_dtype="float32", is_layer=is_layer
    )
    assert (found.copy, found.making, found.made, found.reducing, found.whole) == expected
    assert found.is_kept == (zero > 0 and not is_layer)


def test_copies_of_whole_parameters_send_their_gradients_together() -> None:
    found = [
        backward_bytes(zero=0, num_shards=1, num_copies=copies, dtype="float32", param_dtype="float32", is_layer=True)
        for copies in (1, 4)
    ]
    assert [(each.copy, each.making, each.made) for each in found] == [(0, 4, 4), (0, 8, 4)]


def test_whole_parameters_in_the_compute_dtype_need_no_copy() -> None:
    assert per_parameter(0, 1, "float32") == (4, 4, 8)
    assert per_parameter(1, 8, "float32") == (4 + 4 / 8, 4, 1)  # what was gathered lies beside the shards


def test_units_in_flight() -> None:
    held = static_bytes(
        N, zero=3, num_shards=4, dtype="bfloat16", param_dtype="float32", optimizer="sgd", unit_numel=100,
        root_numel=200,
    )
    assert held.parameters == 4 * N / 4 + 2 * 200  # the root stays gathered
    # The unit in use, the next and its copy; a unit's gradients twice, and the root's.
    assert held.buffers == 2 * 3 * 100 + (2 + 4) * 100 + 2 * 200
    assert held.optimizer == 0


def test_reductions_of_a_step() -> None:
    """A float32 copy of the unit to send, and its shard that arrives; ZeRO 2 and 3 have them in every micro-batch."""
    assert reduction_bytes(100, zero=0, num_shards=1) == 4 * (100 + 100)
    assert reduction_bytes(100, zero=1, num_shards=4) == 4 * (100 + 25)
    assert reduction_bytes(100, zero=1, num_shards=1) == 0
    assert reduction_bytes(100, zero=2, num_shards=4) == reduction_bytes(100, zero=3, num_shards=4) == 0


def test_a_fused_step_has_no_temporaries_and_a_streamed_one_what_it_fetches() -> None:
    assert step_temporary_bytes(zero=0, num_shards=1) == 0
    assert step_temporary_bytes(zero=1, num_shards=4, optimizer="adamw") == 8 / 4


def test_optimizers() -> None:
    assert per_parameter(0, 1, optimizer="sgd_momentum")[2] == 4
    assert optimizer_step_bytes(N, zero=1, num_shards=4, optimizer="adamw") == 28 * N / 4
    assert optimizer_step_bytes(N, zero=0, num_shards=4, optimizer="sgd") == 12 * N
    assert check_optimizer("AdamW") == "adamw"
    with pytest.raises(InputError, match="did you mean adam or adamw"):
        check_optimizer("adamv")


def test_libraries_take_their_workspace_on_gpus_alone() -> None:
    assert workspace_bytes(device_type("H100-80GB")) == 32 * 2**20
    assert workspace_bytes(device_type("CPU")) == 0
