"""Files that tools print of a machine's topology: samples are read as what they are of, damaged ones refused."""

import re
from pathlib import Path

import pytest

from autopar.cluster.cluster import Cluster
from autopar.cluster.parse import parse_cluster
from autopar.cluster.resize import with_nodes
from autopar.cluster.tables import link_preset
from autopar.errors import InputError

SAMPLES = Path(__file__).parent / "samples"
H100, V100, PCIE = (SAMPLES / name for name in ("h100-nvswitch.txt", "v100-mesh.txt", "pcie-only.txt"))
A100_XML, RTX_XML = SAMPLES / "a100-nvswitch.xml", SAMPLES / "rtx-pcie.xml"


def read(text: object) -> Cluster:
    return parse_cluster(str(text))


def test_gpus_behind_a_switch_use_all_their_nvlinks() -> None:
    cluster = read(H100)
    (node,) = cluster.nodes
    assert (node.num_devices, node.device.name, node.link.name) == (8, "H100-80GB", "NVLink4")
    assert node.link.bandwidth_bytes_per_s == link_preset("NVLink4").bandwidth_bytes_per_s
    assert str(H100) in node.link.source
    assert cluster.nodes == read(f"{H100}:H100-80GB").nodes


def test_a_mesh_of_nvlinks_counts_the_links_of_a_device() -> None:
    """DGX-1: each V100 has six links to four others, and pairs without one are no part of the ring."""
    (node,) = read(V100).nodes
    assert (node.num_devices, node.device.name) == (8, "V100-16GB")
    assert node.link.bandwidth_bytes_per_s == link_preset("NVLink2").bandwidth_bytes_per_s


def test_fewer_links_are_slower(tmp_path: Path) -> None:
    path = tmp_path / "topo.txt"
    path.write_text("\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV3\t0-7\nGPU1\tNV3\t X \t0-7\n")
    (node,) = read(f"{path}:A100-40GB").nodes
    assert node.link.bandwidth_bytes_per_s == link_preset("NVLink3").bandwidth_bytes_per_s * 3 / 12
    assert "3 of 12 NVLinks" in node.link.source


def test_pairs_without_nvlink_make_pcie_decide(tmp_path: Path) -> None:
    (node,) = read(f"{PCIE}:A10G").nodes
    assert node.link.name == "PCIe4"
    crossed = tmp_path / "crossed.txt"
    crossed.write_text(matrix(4, {(0, 2): "NV4", (1, 3): "NV4"}))
    (node,) = read(f"{crossed}:A100-80GB").nodes  # ranks of a node follow each other, and those bridges do not
    assert node.link.name == "PCIe4"
    assert "4 of 6 pairs have no NVLink" in node.link.source


def matrix(count: int, joins: dict[tuple[int, int], str]) -> str:
    """What nvidia-smi prints for GPUs joined so, and by SYS else."""
    rows = [[joins.get((min(a, b), max(a, b)), "SYS") if a != b else "X" for b in range(count)] for a in range(count)]
    lines = ["\t" + "\t".join(f"GPU{i}" for i in range(count)) + "\tCPU Affinity"]
    return "\n".join([*lines, *("\t".join([f"GPU{i}", *row, "0-7"]) for i, row in enumerate(rows))]) + "\n"


def test_islands_of_nvlinks_are_nodes_with_pcie_between(tmp_path: Path) -> None:
    """Bridges over pairs of A100 PCIe cards, with all twelve links of each."""
    bridged = tmp_path / "bridged.txt"
    bridged.write_text(PCIE.read_text().replace("PHB", "NV12"))
    cluster = read(f"{bridged}:A100-80GB")
    assert [(node.num_devices, node.link.name, node.network.name) for node in cluster.nodes] == [
        (2, "NVLink3", "PCIe4 x2")] * 2
    pcie = link_preset("PCIe4").bandwidth_bytes_per_s
    assert cluster.nodes[0].network.bandwidth_bytes_per_s == 2 * pcie
    assert "islands of one machine" in cluster.nodes[0].network.source
    with pytest.raises(InputError, match="one machine whose NVLinks join parts of it"):
        with_nodes(cluster, 4)

    single = tmp_path / "single.txt"  # a pair, two cards alone, and a mesh of four without a switch
    single.write_text(matrix(8, {(0, 1): "NV4", (4, 5): "NV2", (5, 6): "NV2", (6, 7): "NV2", (4, 7): "NV2"}))
    nodes = read(f"{single}:A100-80GB").nodes
    assert [(node.num_devices, node.link.name) for node in nodes] == [
        (2, "NVLink3 x4"), (1, "PCIe4"), (1, "PCIe4"), (4, "NVLink3 x4")]
    assert nodes[1].network.bandwidth_bytes_per_s == pcie


def test_nccl_s_dump_gives_gpus_links_and_network() -> None:
    (node,) = read(A100_XML).nodes
    assert (node.num_devices, node.device.name, node.link.name) == (4, "A100-80GB", "NVLink3")
    assert node.network.bandwidth_bytes_per_s == 4 * 200e9 / 8
    assert str(A100_XML) in node.network.source


@pytest.mark.parametrize(("number", "device", "link"), [
    ("0x2335", "H200", "NVLink4"), ("0x2342", "GH200", "NVLink4"), ("0x2901", "B200", "NVLink5"),
    ("0x2941", "GB200", "NVLink5"), ("0x2330", "H100-80GB", "NVLink4"),
])
def test_newer_cards_are_known_by_their_numbers(tmp_path: Path, number: str, device: str, link: str) -> None:
    path = tmp_path / "topo.xml"
    path.write_text(A100_XML.read_text().replace("0x20b2", number).replace('count="2"', 'count="3"'))
    (node,) = read(path).nodes
    assert node.device.name == device
    assert node.link.name == link, node.link
    assert node.link.bandwidth_bytes_per_s == link_preset(link).bandwidth_bytes_per_s


def test_the_narrowest_slot_decides_where_there_is_no_nvlink() -> None:
    (node,) = read(RTX_XML).nodes
    assert (node.num_devices, node.device.name) == (2, "RTX-3090")
    assert node.link.bandwidth_bytes_per_s == pytest.approx(8e9 * 8 / 8 * 128 / 130)
    assert node.network.bandwidth_bytes_per_s == 10e9 / 8


def test_links_between_gpus_themselves(tmp_path: Path) -> None:
    path = tmp_path / "pair.xml"
    text = RTX_XML.read_text().replace("0x2204", "0x20b0")
    for own, other in (("0", "0000:02:00.0"), ("1", "0000:01:00.0")):
        link = f'><nvlink target="{other}" count="6" tclass="0x030200"/></gpu>'
        text = re.sub(rf'(<gpu dev="{own}"[^/]*)/>', rf"\1{link}", text)
    path.write_text(text)
    (node,) = read(path).nodes
    assert node.link.bandwidth_bytes_per_s == link_preset("NVLink3").bandwidth_bytes_per_s / 2


@pytest.mark.parametrize(("sample", "change", "words"), [
    (H100, lambda text: re.sub(r"GPU \d: .*\n", "", text), "not which they are"),
    (H100, lambda text: text.replace("GPU 1: NVIDIA H100 80GB HBM3", "GPU 1: NVIDIA H200"), "differ"),
    (H100, lambda text: text.replace("NVIDIA H100 80GB HBM3", "NVIDIA Z9"), "no preset for NVIDIA Z9"),
    (H100, lambda text: text[: text.index("GPU5\tNV18")], "GPU5, GPU6, GPU7"),
    (H100, lambda text: text.replace("GPU3\tNV18", "GPU3\tFAST", 1), "'FAST'"),
    (H100, lambda text: text.replace("\x1b[4mGPU0\tGPU1", "GPU0\tGPU7", 1), "GPU0, GPU1, ... are expected"),
    (V100, lambda text: text.replace("Tesla V100-SXM2-16GB, 16384", "Tesla T4, 15360"), "another device"),
    (A100_XML, lambda text: text[:900], "cut off"),
    (A100_XML, lambda text: "<topology/>", "<topology>"),
    (A100_XML, lambda text: '<system version="1"></system>', "no GPU"),
    (A100_XML, lambda text: text.replace("0x20b2", "0xffff"), "PCI device number 0xffff"),
    (A100_XML, lambda text: text.replace("0x20b2", "0x20b0", 1), "differ"),
    (A100_XML, lambda text: text.replace('count="2"', 'count="two"', 1), "count is 'two'"),
])
def test_what_is_damaged_is_refused_in_one_line(tmp_path: Path, sample: Path, change, words: str) -> None:
    path = tmp_path / sample.name
    path.write_text(change(sample.read_text()))
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="H100-80GB"):
        read(f"{PCIE}:H100-8GB")
    with pytest.raises(InputError, match=r"no such|cannot read"):
        read("gone/topo.txt")
