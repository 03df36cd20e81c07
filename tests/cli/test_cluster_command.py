"""`autopar cluster show`: every rate with its source, and a file that is the same cluster."""

from pathlib import Path

import pytest

from autopar.cluster.parse import parse_cluster

SAMPLES = Path(__file__).parent.parent / "cluster" / "samples"


def test_rates_and_their_sources_are_shown(autopar) -> None:
    run = autopar("cluster", "show", "1x8xA100-80GB+2x4xV100-16GB@100Gbps")
    assert run.code == 0
    for word in ("16 devices on 3 nodes", "A100-80GB", "NVLink2", "100Gbps", "vendor: ", "given in the shorthand"):
        assert word in " ".join(run.out.split())
    value = autopar("cluster", "show", "1x8xA100-80GB+2x4xV100-16GB@100Gbps", "--json").value
    assert [(row["count"], row["devices"]) for row in value["nodes"]] == [(1, 8), (2, 4)]
    assert all(rate["source"] for device in value["devices"] for rate in device["rates"])
    assert all(link["source"] for link in value["links"])


def test_the_exact_file_is_the_same_cluster(autopar, tmp_path: Path) -> None:
    path = tmp_path / "node.json"
    sample = SAMPLES / "a100-nvswitch.xml"
    assert autopar("cluster", "show", sample, "-o", path).code == 0
    assert parse_cluster(str(path)).nodes == parse_cluster(str(sample)).nodes


@pytest.mark.parametrize(("words", "word"), [
    (("8xH100-8GB",), "H100-80GB"), (("gone.yaml",), "gone.yaml"), ((str(SAMPLES / "pcie-only.txt"),), "nvidia-smi -L"),
    (("8xT4", "-o", "/no/such/folder/x.json"), "/no/such/folder"),
])
def test_bad_input_is_one_line(autopar, words: tuple[str, ...], word: str) -> None:
    run = autopar("cluster", "show", *words)
    assert (run.code, len(run.err.splitlines())) == (2, 1)
    assert word in run.err
