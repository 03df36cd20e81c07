"""The table of efficiencies: every constant says where it comes from, and every device has an entry."""

from __future__ import annotations

from dataclasses import fields

import pytest

from autopar.cost_models.compute import attention_efficiency
from autopar.cost_models.efficiency import KINDS, Efficiency, efficiency_of, table
from autopar.cost_models.hardware import device_names, device_type
from autopar.cost_models.matmul import ALIGNED_SHARE

WHERE_KNOWN_APART = {"attention_backward_half_keys", "odd_rows"}


@pytest.mark.parametrize("device", table()["devices"])
def test_every_constant_has_a_kind_and_a_source(device: str) -> None:
    entry = table()["devices"][device]
    assert set(entry) | WHERE_KNOWN_APART == {field.name for field in fields(Efficiency)}
    for field in entry.values():
        assert set(field) == {"value", "kind", "source"}
        assert field["kind"] in KINDS
        assert field["source"] in table()["sources"]


def test_every_source_is_used_and_says_something() -> None:
    used = {field["source"] for entry in table()["devices"].values() for field in entry.values()}
    assert used == set(table()["sources"])
    assert all(source["text"] for source in table()["sources"].values())


@pytest.mark.parametrize("name", device_names())
def test_presets_have_entries_of_their_own(name: str) -> None:
    assert any(name.startswith(prefix) for prefix in table()["devices"] if prefix)


def test_the_longest_name_wins_and_unknown_devices_get_the_last_entry() -> None:
    assert efficiency_of("H100-96GB-500W").matmul < efficiency_of("H100-80GB").matmul
    assert efficiency_of("GB200").matmul < efficiency_of("B200").matmul
    assert efficiency_of("made by nobody") == efficiency_of("")


def test_attention_reaches_half_at_its_half_length() -> None:
    """Causal, at 450 keys on an A100; without a mask, at 225; heads of 64 at 0.8 of that."""
    a100 = device_type("A100-80GB")
    assert attention_efficiency(a100, 128, 450) == pytest.approx((0.67 / 2, 0.58 / 2))
    assert attention_efficiency(a100, 128, 225, causal=False) == pytest.approx((0.67 / 2, 0.58 / 2))
    assert attention_efficiency(a100, 64) == pytest.approx((0.67 * 0.8, 0.58 * 0.8))


def test_what_is_not_known_apart_is_as_the_general_figure() -> None:
    a100, h100 = efficiency_of("A100-80GB"), efficiency_of("H100-80GB")
    assert (a100.attention_backward_half_keys, a100.odd_rows) == (a100.attention_half_keys, ALIGNED_SHARE[1])
    assert (h100.attention_backward_half_keys, h100.odd_rows) == (700, 0.16)
