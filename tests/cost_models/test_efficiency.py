"""The table of efficiencies: every constant says where it comes from, and every device has an entry."""

from __future__ import annotations

from dataclasses import fields

import pytest

from autopar.cost_models.compute import attention_efficiency, matmul_efficiency
from autopar.cost_models.efficiency import KINDS, Efficiency, efficiency_of, table
from autopar.cost_models.hardware import device_names, device_type
from autopar.cost_models.matmul import ALIGNED_SHARE

WHERE_KNOWN_APART = {"attention_backward_half_keys", "attention_tile_rows", "odd_rows"}


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
    assert efficiency_of("GB200").matmul != efficiency_of("B200").matmul
    assert efficiency_of("made by nobody") == efficiency_of("")


def test_attention_reaches_half_at_its_half_length() -> None:
    """Causal, at 450 keys on an A100; without a mask, at 225; heads of 64 at 0.8 of that."""
    a100 = device_type("A100-80GB")
    assert attention_efficiency(a100, 128, 450) == pytest.approx((0.74 / 2, 0.60 / 2))
    assert attention_efficiency(a100, 128, 225, causal=False) == pytest.approx((0.74 / 2, 0.60 / 2))
    assert attention_efficiency(a100, 64) == pytest.approx((0.74 * 0.8, 0.60 * 0.8))


def test_few_heads_leave_multiprocessors_idle() -> None:
    """Llama's attention at 4096 keys as SimuMax timed it on an A100 of 300 W, and on a B200: causal work over peak."""
    for name, heads, forward, backward in (
        ("A100-80GB", 64, 0.594, 0.503), ("A100-80GB", 16, 0.494, 0.444), ("A100-80GB", 8, 0.390, 0.381),
        ("B200", 64, 0.436, 0.365), ("B200", 16, 0.290, 0.378), ("B200", 8, 0.155, 0.329),
    ):
        found = attention_efficiency(device_type(name), 128, 4096, queries=heads * 4096)
        assert found == pytest.approx((forward, backward), rel=0.25)
    # 8 heads of 32 tiles, half of each, for 108 multiprocessors: 1.19 whole tiles; a length of half the rate.
    a100 = attention_efficiency(device_type("A100-80GB"), 128, 450, queries=8 * 4096)
    assert a100 == pytest.approx((0.37 * 1.1852 / 2.1852, 0.30 * 1.1852 / 1.4852), rel=1e-3)


@pytest.mark.parametrize(("name", "tflops"), [("A100-80GB", 257.5), ("H200", 710)])
def test_a_large_product_takes_what_it_takes_under_the_power_limit(name: str, tflops: float) -> None:
    device = device_type(name)
    rate = device.peak("bfloat16") * matmul_efficiency(device, 8192, 8192, 8192)
    assert rate == pytest.approx(tflops * 1e12, rel=0.01)


@pytest.mark.parametrize(("m", "k", "n", "share"), [
    (4096, 8192, 57344, 0.487), (4096, 28672, 8192, 0.485), (4096, 57344, 8192, 0.483), (8192, 4096, 28672, 0.459),
])
def test_llama_products_on_a_b200(m: int, k: int, n: int, share: float) -> None:
    assert matmul_efficiency(device_type("B200"), m, n, k) == pytest.approx(share, rel=0.06)


def test_what_is_not_known_apart_is_as_the_general_figure() -> None:
    a100, h100 = efficiency_of("A100-80GB"), efficiency_of("H100-80GB")
    assert (a100.attention_backward_half_keys, a100.odd_rows) == (a100.attention_half_keys, ALIGNED_SHARE[1])
    assert (h100.attention_backward_half_keys, h100.odd_rows) == (700, 0.16)
