"""Parts of a cluster: some of its devices as a Cluster of their own, such as "lab.yaml#0-15"."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from autopar.cluster.cluster import Cluster
from autopar.errors import InputError

_PART = re.compile(r"(?P<whole>.*)#(?P<ranks>[^#]*)", re.DOTALL)
_RUN = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", re.ASCII)


def part_of(cluster: Cluster, ranks: Sequence[int]) -> Cluster:
    """The devices with these ranks, in the cluster's order, behind the networks of their nodes.

    The cluster itself where these are all. InputError for no rank, one that there is not, or one given twice.
    """
    if not ranks:
        raise InputError(f"cluster {cluster.name}: a part of it needs a device")
    if max(ranks) >= cluster.num_devices:
        raise InputError(
            f"cluster {cluster.name}: there is no device {max(ranks)}; its {cluster.num_devices} are numbered from 0"
        )
    if len(set(ranks)) < len(ranks):
        raise InputError(f"cluster {cluster.name}: a part of it has a device twice")
    if len(ranks) == cluster.num_devices:
        return cluster
    used = Counter(cluster.node_of[rank] for rank in ranks)
    return Cluster(
        name=f"{cluster.name}#{ranges(tuple(sorted(ranks)))}",
        nodes=tuple(replace(node, num_devices=used[i]) for i, node in enumerate(cluster.nodes) if used[i]),
    )


def split_part(text: str) -> tuple[str, tuple[int, ...]] | None:
    """The text of the whole cluster and the ranks of "CLUSTER#0-7,12"; None for a text that names no part.

    InputError where what follows the # are no device numbers.
    """
    match = _PART.fullmatch(text)
    if match is None or os.path.exists(text):
        return None
    ranks: list[int] = []
    for item in match["ranks"].split(","):
        run = _RUN.fullmatch(item)
        if run is None or int(run[2] or run[1]) < int(run[1]):
            raise InputError(
                f"cluster {text!r}: behind the # stand numbers of its devices, as in {match['whole']}#0-7,12"
            )
        first, last = int(run[1]), int(run[2] or run[1])
        if last - first >= 1_000_000:
            raise InputError(f"cluster {text!r}: a million devices are more than any plan is for")
        ranks.extend(range(first, last + 1))
    return match["whole"], tuple(ranks)


def ranges(numbers: tuple[int, ...]) -> str:
    """Numbers as runs and strides: "0-7", "0,8,16", "0-3,8-11"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] + 1 == number:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
