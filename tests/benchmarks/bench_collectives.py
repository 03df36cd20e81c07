"""Modelled collective times beside published curves: `python tests/benchmarks/bench_collectives.py`.

Reads collectives.csv and collectives_vtrain_allreduce.csv from the folder in AUTOPAR_REFDATA (default
../shared/refdata from the repository's root). Prints, by source and group, the mean error of the modelled time for
messages below and above 16 MiB.
"""

from __future__ import annotations

import csv
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from autopar.cluster.cluster import GroupShape
from autopar.cluster.tables import link_preset, network_link
from autopar.cost_models.collectives import collective_time_s
from autopar.sharding.reshard import Collective

LINKS = (
    (r"GB200|B200", "NVLink5"), (r"H100|H200", "NVLink4"), (r"A100-PCIe", "PCIe4"), (r"A100", "NVLink3"),
    (r"V100", "NVLink2"), (r"MI300X", "xGMI3"),
)
# Rate of a node's network in Gb/s where the row's own words do not say: EFA v1 and v2, InfiniBand, TCPXO.
NETWORKS = ((r"4x100 Gb", 400), (r"3200 Gb", 3200), (r"8x400", 3200), (r"8x200", 1600))


class Sample(NamedTuple):
    source: str
    kind: Collective
    group: GroupShape
    size_bytes: float
    time_s: float


def folder() -> Path:
    default = Path(__file__).resolve().parents[3] / "shared" / "refdata"
    return Path(os.environ.get("AUTOPAR_REFDATA", default))


def samples(path: Path) -> Iterator[Sample]:
    """The rows that name a size, a time or bus bandwidth, and hardware that the tables know."""
    with (path / "collectives.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            size, nodes, n = float(row["size_bytes"] or 0), int(row["nodes"] or 1), int(row["n_gpus"])
            link = next((name for pattern, name in LINKS if re.search(pattern, row["gpu"])), None)
            if row["gpu"].startswith("unnamed"):
                link = "NVLink3"
            if link is None or size < 2**10 or row["collective"] == "p2p" or "NVL72" in row["gpu"]:
                continue
            gbps = next((rate for pattern, rate in NETWORKS if pattern in row["fabric"]), None)
            if nodes > 1 and gbps is None:
                continue
            kind = Collective(row["collective"])
            time = float(row["time_us"] or 0) * 1e-6
            if not time:
                rounds = 2 if kind is Collective.ALL_REDUCE else 1
                time = rounds * (n - 1) / n * size / (float(row["busbw_GBps"]) * 1e9)
            group = GroupShape(
                size=n, num_nodes=nodes, per_node=n // nodes, link=link_preset(link),
                network=network_link(gbps or 400, "vendor: the row"),
            )
            words = f"{row['source'].split(':')[0].split('@')[0].strip()} {row['gpu'][:20]} {row['algo']}".strip()
            # An all-to-all's size is what one rank sends; the model counts all ranks' tensor.
            yield Sample(words, kind, group, size * (n if kind is Collective.ALL_TO_ALL else 1), time)
    with (path / "collectives_vtrain_allreduce.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            link = "NVLink3" if row["gpu"] == "A100" else "NVLink2"
            n = int(row["n_gpus"])
            group = GroupShape(
                size=n, num_nodes=1, per_node=n, link=link_preset(link), network=network_link(400, "vendor: the row")
            )
            time = float(row["time_us_oop"]) * 1e-6
            yield Sample(f"vTrain {row['gpu']}", Collective.ALL_REDUCE, group, float(row["size_bytes"]), time)


def report(path: Path) -> list[str]:
    """A line for each source and group: samples, mean absolute error and bias, small messages and large ones."""
    errors: dict[tuple[str, str, int, int], tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for sample in samples(path):
        key = (sample.source, str(sample.kind), sample.group.size, sample.group.num_nodes)
        error = collective_time_s(sample.kind, sample.size_bytes, sample.group) / sample.time_s - 1
        errors[key][sample.size_bytes >= 16 * 2**20].append(error)
    lines = [f"{'source':58}{'collective':16}{'n':>4}{'nodes':>6}{'< 16 MiB: error, bias':>26}{'>= 16 MiB':>20}"]
    for (source, kind, n, nodes), parts in errors.items():
        cells = [_cell(part) for part in parts]
        lines.append(f"{source[:57]:58}{kind:16}{n:>4}{nodes:>6}{cells[0]:>26}{cells[1]}")
    return lines


def _cell(errors: list[float]) -> str:
    if not errors:
        return " " * 20
    return f"{len(errors):>4}{statistics.fmean(map(abs, errors)):>8.1%}{statistics.fmean(errors):>+8.1%}"


def main() -> None:
    path = folder()
    if not (path / "collectives.csv").is_file():
        print(f"skipped: no collectives.csv in {path}; set AUTOPAR_REFDATA to the folder of the reference data")
        return
    print("\n".join(report(path)))


if __name__ == "__main__":
    main()
