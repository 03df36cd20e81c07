"""Nodes out of what a topology file says of a machine's GPUs: which they are, and what joins them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autopar.cluster.cluster import Link, Node
from autopar.cluster.tables import Preset, default_network, link_preset, network_link, preset
from autopar.errors import InputError

# NVLinks of one device, all of whose rate is that of the link in the table: NVIDIA's data sheets of V100, A100, H100
# and Blackwell (A800: the A100's with 8 of 12).
_LINKS_OF = {"NVLink2": 6, "NVLink3": 12, "NVLink3-A800": 8, "NVLink4": 18, "NVLink5": 18}
_PCIE_OF = {"NVLink2": "PCIe3", "NVLink3": "PCIe4", "NVLink3-A800": "PCIe4", "NVLink4": "PCIe5", "NVLink5": "PCIe5"}

Pair = tuple[int, int]


def joined_nodes(
    kind: Preset, num_devices: int, nvlinks: Mapping[Pair, int], *, pcie_bytes_per_s: float | None = None,
    network_gbps: float | None = None, where: str,
) -> tuple[Node, ...]:
    """A machine with `num_devices` of a preset's device: one node, or an island of NVLinks each.

    `nvlinks`: NVLinks between two devices, by (lower, higher). Where every device reaches every other by NVLink with
    more links than it has in all divided by its peers, a switch joins them and each uses all of them; else its links
    are shared out among its peers, and their sum counts. Where NVLinks join neighbours in rank, but not all devices
    (bridges over pairs, say), each such island is a node of its own, and what lies between is PCIe. Where they join
    devices that do not follow each other, the slowest way decides: PCIe.
    `pcie_bytes_per_s` and `network_gbps`: what is known of those, the usual ones of the device otherwise.
    """
    pairs = [(one, other) for one in range(num_devices) for other in range(one + 1, num_devices)]
    linked = [pair for pair in pairs if nvlinks.get(pair)]
    chosen = kind.link
    if pairs and _hang_together(num_devices, nvlinks):
        chosen = _nvlink(kind, num_devices, nvlinks, where)
    elif pairs:
        islands = _islands(num_devices, nvlinks)
        if linked and islands is not None:
            return _island_nodes(kind, islands, nvlinks, pcie_bytes_per_s, where)
        lacking = len(pairs) - len(linked)
        chosen = _pcie(kind, pcie_bytes_per_s, where, f"{lacking} of {len(pairs)} pairs have no NVLink")
    network = default_network(kind, num_devices) if network_gbps is None else network_link(
        network_gbps, f"measured: network cards listed in {where}")
    return (Node(device=kind.device, num_devices=num_devices, link=chosen, network=network),)


def _hang_together(num_devices: int, nvlinks: Mapping[Pair, int]) -> bool:
    """Whether NVLinks alone carry a collective of all these devices."""
    pairs = [(one, other) for one in range(num_devices) for other in range(one + 1, num_devices)]
    return all(nvlinks.get(pair) for pair in pairs) or _ring(num_devices, nvlinks)


def _islands(num_devices: int, nvlinks: Mapping[Pair, int]) -> list[range] | None:
    """The devices that NVLinks join, as runs of neighbours; None where they are no such runs, or no whole islands."""
    home = list(range(num_devices))
    for (one, other), count in nvlinks.items():
        if count:
            kept, given = sorted((home[one], home[other]))
            home = [kept if own == given else own for own in home]
    if home != sorted(home):
        return None
    found = [range(first, first + home.count(first)) for first in dict.fromkeys(home)]
    return found if all(_hang_together(len(run), _inside(run, nvlinks)) for run in found) else None


def _inside(run: range, nvlinks: Mapping[Pair, int]) -> dict[Pair, int]:
    """The NVLinks of an island, its devices numbered from zero."""
    return {(one - run.start, other - run.start): count for (one, other), count in nvlinks.items()
            if one in run and other in run}


def _island_nodes(
    kind: Preset, islands: Sequence[range], nvlinks: Mapping[Pair, int], pcie_bytes_per_s: float | None, where: str
) -> tuple[Node, ...]:
    pcie = _pcie(kind, pcie_bytes_per_s, where, "NVLink joins only some of the GPUs")
    nodes = []
    for run in islands:
        between = replace(
            pcie, name=f"{pcie.name} x{len(run)}" if len(run) > 1 else pcie.name,
            bandwidth_bytes_per_s=len(run) * pcie.bandwidth_bytes_per_s,
            source=f"between islands of one machine, a lane set a device; {pcie.source}",
        )
        link = _nvlink(kind, len(run), _inside(run, nvlinks), where) if len(run) > 1 else pcie
        nodes.append(Node(device=kind.device, num_devices=len(run), link=link, network=between))
    return tuple(nodes)


def _ring(num_devices: int, nvlinks: Mapping[Pair, int]) -> bool:
    """Whether NVLinks alone make a way through all devices, on which a collective's ring runs.

    Every device of a mesh such as the DGX-1's has at least two neighbours, and all of them hang together.
    """
    neighbours: dict[int, set[int]] = {device: set() for device in range(num_devices)}
    for (one, other), count in nvlinks.items():
        if count:
            neighbours[one].add(other)
            neighbours[other].add(one)
    if any(len(found) < 2 for found in neighbours.values()):
        return False
    reached, todo = {0}, [0]
    while todo:
        fresh = neighbours[todo.pop()] - reached
        reached |= fresh
        todo += fresh
    return len(reached) == num_devices


def _nvlink(kind: Preset, num_devices: int, nvlinks: Mapping[Pair, int], where: str) -> Link:
    most = _LINKS_OF.get(kind.link.name)
    if most is None:
        raise InputError(f"{where}: it shows NVLinks, and {kind.device.name} has none: is it another device?")
    sums = [sum(count for pair, count in nvlinks.items() if device in pair) for device in range(num_devices)]
    fewest = min(sums)
    switched = fewest > most
    used = min(most, max(nvlinks.values()) if switched else fewest)
    if used == most:
        return replace(kind.link, source=f"{most} NVLinks a device, says {where}; {kind.link.source}")
    rate = kind.link.bandwidth_bytes_per_s * used / most
    return replace(kind.link, name=f"{kind.link.name} x{used}", bandwidth_bytes_per_s=rate,
                   source=f"{used} of {most} NVLinks a device, says {where}; {kind.link.source}")


def _pcie(kind: Preset, bytes_per_s: float | None, where: str, why: str) -> Link:
    usual = link_preset(_PCIE_OF.get(kind.link.name, kind.link.name))
    if bytes_per_s is None or bytes_per_s == usual.bandwidth_bytes_per_s:
        return replace(usual, source=f"{why}, says {where}; {usual.source}")
    return replace(usual, name=f"PCIe {bytes_per_s / 1e9:.4g}GB/s", bandwidth_bytes_per_s=bytes_per_s,
                   source=f"bandwidth given in {where} ({why}); latency as {usual.name}")


def kind_named(names: Sequence[tuple[str, int | None]], where: str) -> Preset:
    """The preset of GPUs that the driver calls so, with their memory in bytes where known; InputError without one."""
    from autopar.cluster.local import match_cuda_device
    from autopar.cluster.tables import device_names

    distinct = list(dict.fromkeys(names))
    if len({name for name, _ in distinct}) > 1:
        listed = ", ".join(name for name, _ in distinct)
        raise InputError(f"{where}: its GPUs differ ({listed}): describe them in a cluster file, a node for each kind")
    name, memory_bytes = distinct[0]
    if memory_bytes is not None:
        matched = match_cuda_device(name, memory_bytes)
        if matched is not None:
            return preset(matched.name)
    else:
        fitting = [one for one in map(preset, device_names()) if any(part in name for part in one.cuda_names)]
        exact = [one for one in fitting if any(part in name and "GB" in part for part in one.cuda_names)] or fitting
        if len(exact) == 1:
            return exact[0]
    raise InputError(f"{where}: no preset for {name}: name the nearest behind a colon, such as {where}:A100-80GB, or "
                     "give its rates in a cluster file")
