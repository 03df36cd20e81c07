"""The hardware tables: every constant has a source, and every rate is a dense one."""

import pytest

from autopar.cluster.tables import default_network, link_names, link_preset, preset
from autopar.cost_models.hardware import device_names, device_type, dtype_note
from autopar.errors import InputError

PRESETS = (
    "V100-16GB", "V100-32GB", "T4", "L4", "A10G", "RTX-3090", "RTX-4090", "A100-40GB", "A100-80GB", "A800-80GB",
    "H100-80GB", "H100-96GB-500W", "H200", "GH200", "B200", "GB200", "MI300X", "CPU",
)

# What vendors print "with sparsity" for 16-bit products: a table that holds one of these is wrong by two.
SPARSE_16BIT_TFLOPS = {242, 140, 142, 330.3, 330.4, 624, 1979, 1978.9, 4500, 5000, 2614.9}


def test_all_presets_are_there() -> None:
    assert set(PRESETS) <= set(device_names())


@pytest.mark.parametrize("name", device_names())
def test_every_constant_has_a_kind_and_a_source(name: str) -> None:
    device = device_type(name)
    sources = dict(device.sources)
    fields = ["memory_bytes", "memory_bandwidth_bytes_per_s", "kernel_launch_s", "usable_memory_fraction"]
    fields += ["host_bandwidth_bytes_per_s", "host_memory_bytes"] if name != "CPU" else []
    assert (device.host_bandwidth_bytes_per_s is None) == (name == "CPU")
    fields += [f"peak_flops.{dtype}" for dtype, _ in device.peak_flops]
    for field in fields:
        kind, _, text = sources[field].partition(": ")
        assert kind in ("vendor", "measured", "assumed"), field
        assert len(text) > 10, field
        assert kind != "vendor" or "http" in text or "ECC" in text, field
    kind = preset(name)
    assert kind.network_source.startswith(("vendor: ", "measured: ", "assumed: "))
    assert kind.link.source.startswith("bandwidth ")
    assert "; latency " in kind.link.source


@pytest.mark.parametrize("name", device_names())
def test_rates_are_dense(name: str) -> None:
    peaks = dict(device_type(name).peak_flops)
    for dtype in ("bfloat16", "float16"):
        if dtype in peaks:
            assert round(peaks[dtype] / 1e12, 1) not in SPARSE_16BIT_TFLOPS
    if {"bfloat16", "float16"} <= set(peaks):
        assert peaks["bfloat16"] == peaks["float16"]
    if "tf32" in peaks:
        assert peaks["float32"] <= peaks["tf32"] <= peaks["bfloat16"]
    if "fp8" in peaks:
        assert peaks["fp8"] / peaks["bfloat16"] == pytest.approx(2, rel=0.01)
    assert peaks["float64"] <= peaks["float32"]


@pytest.mark.parametrize(("name", "dtype", "tflops", "gib", "gb_per_s"), [
    ("V100-16GB", "float16", 125, 16, 900), ("A100-80GB", "bfloat16", 312, 80, 2039),
    ("H100-80GB", "bfloat16", 989.4, 80, 3350), ("H100-96GB-500W", "bfloat16", 989.4, 96, 2400),
    ("H200", "bfloat16", 989.4, 141, 4800), ("B200", "bfloat16", 2250, 180, 8000),
    ("MI300X", "bfloat16", 1307.4, 192, 5300), ("L4", "bfloat16", 121, 22.5, 300),
    ("RTX-4090", "float16", 165.2, 24, 1008), ("A10G", "bfloat16", 70, 22.5, 600),
])
def test_known_datasheet_values(name: str, dtype: str, tflops: float, gib: float, gb_per_s: float) -> None:
    device = device_type(name)
    assert device.peak(dtype) == pytest.approx(tflops * 1e12)
    assert device.memory_bytes == gib * 1024**3
    assert device.memory_bandwidth_bytes_per_s == pytest.approx(gb_per_s * 1e9)


def test_link_rates_are_of_one_direction() -> None:
    rates = {name: link_preset(name).bandwidth_bytes_per_s for name in link_names()}
    assert [rates[f"NVLink{gen}"] for gen in (2, 3, 4, 5)] == [150e9, 300e9, 450e9, 900e9]
    assert rates["PCIe5"] == 2 * rates["PCIe4"] == 4 * rates["PCIe3"]


def test_default_network_counts_the_nics_of_a_node() -> None:
    assert default_network(preset("H100-80GB"), 8).bandwidth_bytes_per_s == 400e9
    assert default_network(preset("H100-80GB"), 4).bandwidth_bytes_per_s == 200e9
    assert default_network(preset("T4"), 4).bandwidth_bytes_per_s == 12.5e9  # one NIC, whatever sits behind it


def test_a_dtype_without_a_rate_runs_as_float32_and_is_reported() -> None:
    volta = device_type("V100-32GB")
    assert volta.peak("bfloat16") == volta.peak("float32")
    assert "V100-32GB has no bfloat16 rate" in (dtype_note(volta, "bfloat16") or "")
    assert dtype_note(volta, "float16") is None


@pytest.mark.parametrize("name", ["H100", "h100-80gb", "H100_80GB", " H100-80GB "])
def test_short_names(name: str) -> None:
    assert device_type(name).name == "H100-80GB"


@pytest.mark.parametrize(("name", "said"), [
    ("A100", "'A100' may be A100-40GB or A100-80GB"), ("V100", "V100-16GB or V100-32GB"),
    ("H10", "did you mean H100-80GB"), ("B20", "did you mean B200"), ("abacus", "Known: V100-16GB"), ("", "Known:"),
])
def test_unknown_names_give_the_nearest(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        device_type(name)
