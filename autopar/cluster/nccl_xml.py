"""The topology that NCCL dumps (NCCL_TOPO_DUMP_FILE), as a Cluster of one machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from autopar.cluster.cluster import Cluster
from autopar.cluster.joined import Pair, joined_nodes
from autopar.cluster.tables import Preset, preset
from autopar.errors import InputError

# PCI device numbers of NVIDIA's cards that are in the tables: the public list pci.ids; H200 and GH200 as in the list of
# compatible GPUs of NVIDIA's open kernel modules 550.40.82; B200 as lspci prints it on such machines; GB200 from one
# public table of codes alone.
_CARDS = {
    "0x1db1": "V100-16GB", "0x1db5": "V100-32GB", "0x1eb8": "T4", "0x27b8": "L4", "0x2237": "A10G",
    "0x2204": "RTX-3090", "0x2684": "RTX-4090", "0x20b0": "A100-40GB", "0x20b2": "A100-80GB", "0x20f3": "A800-80GB",
    "0x2330": "H100-80GB", "0x2335": "H200", "0x2342": "GH200", "0x2901": "B200", "0x2941": "GB200",
}
_NVSWITCH = "0x068000"  # PCI class of what an NVLink ends at where a switch joins the GPUs
_SPEED = re.compile(r"(?P<number>\d+(?:\.\d+)?) ?GT/s")
_AGAIN = "dump it with NCCL_TOPO_DUMP_FILE=FILE in a run of any NCCL program on the node"


def is_nccl_xml(text: str) -> bool:
    """Whether the text begins as XML."""
    return text.lstrip("\ufeff \t\r\n").startswith("<")


def cluster_from_nccl_xml(text: str, *, device: str | None = None, where: str) -> Cluster:
    """One machine with the GPUs, NVLinks, PCIe and network cards that the file lists; InputError for anything else.

    The GPUs are known by their PCI numbers, or `device` names their preset.
    """
    try:
        root = ElementTree.fromstring(text.lstrip("\ufeff \t\r\n"))
    except ElementTree.ParseError as error:
        raise InputError(f"{where}, line {error.position[0]}: not XML, or cut off; {_AGAIN}") from None
    if root.tag != "system":
        raise InputError(f"{where}: XML that begins with <{root.tag}>, not NCCL's <system>; {_AGAIN}")
    cards = list(_cards(root))
    if not cards:
        raise InputError(f"{where}: it lists no GPU; {_AGAIN}")
    kind = preset(device) if device is not None else _kind([card for _, card, _ in cards], where)
    index = {card.get("busid", "").lower(): i for i, (_, card, _) in enumerate(cards)}
    rates = [rate for _, _, rate in cards if rate is not None]
    nodes = joined_nodes(
        kind, len(cards), _nvlinks(cards, index, where), pcie_bytes_per_s=min(rates, default=None),
        network_gbps=_network_gbps(root), where=where,
    )
    return Cluster(name=where, nodes=nodes)


_Card = tuple[ElementTree.Element, ElementTree.Element, float | None]


def _cards(root: ElementTree.Element) -> Iterator[_Card]:
    """(gpu, its PCI device, the slowest PCIe rate on its way to the processor), by the numbers of the GPUs."""
    found: list[_Card] = []

    def walk(element: ElementTree.Element, slowest: float | None) -> None:
        for child in element:
            rate = slowest
            if child.tag == "pci":
                own = _pcie_bytes_per_s(child)
                rate = own if slowest is None else slowest if own is None else min(own, slowest)
            if child.tag == "gpu":
                found.append((child, element, slowest))
            walk(child, rate)

    walk(root, None)
    return iter(sorted(found, key=lambda card: _number(card[0].get("dev")) or 0))


def _pcie_bytes_per_s(card: ElementTree.Element) -> float | None:
    """One direction's rate: transfers of one bit a lane, 128 of 130 bits are data (8b/10b below 8 GT/s)."""
    speed, lanes = _SPEED.match(card.get("link_speed", "")), _number(card.get("link_width"))
    if speed is None or not lanes:
        return None
    transfers = float(speed["number"]) * 1e9
    return transfers * lanes / 8 * (128 / 130 if transfers >= 8e9 else 0.8)


def _kind(cards: list[ElementTree.Element], where: str) -> Preset:
    numbers = list(dict.fromkeys(card.get("device", "").lower() for card in cards))
    if len(numbers) > 1:
        listed = ", ".join(numbers)
        raise InputError(f"{where}: its GPUs differ (PCI devices {listed}): describe them in a cluster file")
    if numbers[0] not in _CARDS:
        raise InputError(f"{where}: GPUs with PCI device number {numbers[0] or 'unknown'} are in no table: name their "
                         f"preset behind a colon, such as {where}:H200")
    return preset(_CARDS[numbers[0]])


def _nvlinks(cards: list[_Card], index: dict[str, int], where: str) -> dict[Pair, int]:
    """NVLinks by pair of GPUs; links to a switch join a GPU with every other that has some."""
    found: dict[Pair, int] = {}
    switched: dict[int, int] = {}
    for one, (gpu, _, _) in enumerate(cards):
        for link in gpu.iter("nvlink"):
            count = _number(link.get("count"))
            if count is None or count < 1:
                raise InputError(f"{where}: GPU {one} has an NVLink whose count is {link.get('count')!r}; {_AGAIN}")
            other = index.get(link.get("target", "").lower())
            if other is not None and other != one:
                found[min(one, other), max(one, other)] = count
            elif link.get("tclass") == _NVSWITCH:
                switched[one] = switched.get(one, 0) + count
    for one, own in switched.items():
        for other, theirs in switched.items():
            if one < other:
                found[one, other] = found.get((one, other), 0) + min(own, theirs)
    return found


def _network_gbps(root: ElementTree.Element) -> float | None:
    """All network cards' rates together, which NCCL gives in Mb/s; None where none is listed."""
    ports = {(net.get("guid") or net.get("name"), net.get("port")): net.get("speed") for net in root.iter("net")}
    total = sum(_number(speed) or 0 for speed in ports.values())
    return total / 1e3 if total else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,9}", text) else None
