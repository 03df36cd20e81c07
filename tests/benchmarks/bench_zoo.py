"""The model zoo's coverage: what is captured, which ops have rules, what two tensor ranks repeat, and their numbers.

    python tests/benchmarks/bench_zoo.py [NAME ...] [--json]

A row a model: ops and distinct targets of its block classes, ops with a rule, ops that each of two tensor ranks runs
whole with their share of the time (on devices so slow that splitting these tiny models pays), the largest relative
error of loss and gradients on two processes against one, in float64, and whether that is within 1e-9.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))

from all_entries import ENTRIES
from entry import Entry
from harness import captured, parity, tensor_plan
from local_machines import slow_cluster

from autopar.errors import AutoparError
from autopar.runtime.local import LocalPool
from autopar.search.coverage import plan_coverage


def row(entry: Entry, pool: LocalPool) -> dict[str, Any]:
    """The figures of one entry, as far as it comes; `why` says what stopped it."""
    found: dict[str, Any] = {"model": entry.name, "family": entry.family, "captured": False, "parity": False}
    began = time.perf_counter()
    try:
        graph = captured(entry).graph
        found |= {"captured": True, "capture_s": time.perf_counter() - began}
        targets = {op.target for block in graph.blocks for op in graph.block_class[block.cls].ops}
        plan = tensor_plan(entry)
        coverage = plan_coverage(graph, slow_cluster(2), plan)
        found |= {
            "ops": coverage.num_ops, "targets": len(targets), "with_rule": coverage.num_ruled,
            "without_rule": [item.target for item in coverage.without_rule],
            "repeated": coverage.num_repeated, "repeated_share": coverage.repeated_share,
        }
        report = parity(entry, plan, pool)
        found |= {"error": max(report.loss_error, report.worst[1]), "parity": report.passed}
    except AutoparError as error:
        found["why"] = str(error).splitlines()[0]
    return found


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    if "ops" not in found:
        return f"{found['model']:<18} {found['family']:<10} {found.get('why', '')}"
    return (
        f"{found['model']:<18} {found['family']:<10} {found['capture_s']:9.1f} {found['ops']:3d} {found['targets']:7d} "
        f"{found['with_rule']:5d} {found['repeated']:8d} {found['repeated_share']:7.1%} "
        f"{found.get('error', float('nan')):9.1e} {'yes' if found['parity'] else found.get('why', 'no')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; the whole zoo if left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    known = {entry.name: entry for entry in ENTRIES}
    if unknown := sorted({*options.names} - known.keys()):
        parser.error(f"no model {unknown[0]!r} in the zoo; it has {', '.join(known)}")
    warnings.simplefilter("ignore")
    if not options.json:
        print(f"{'model':<18} {'family':<10} {'capture s':>7} ops targets ruled repeated    time     error "
              "equal to one process")
    rows = []
    pool = LocalPool(2)
    for name in options.names or known:
        if pool.is_closed:
            pool = LocalPool(2)
        rows.append(row(known[name], pool))
        if not options.json:
            print(line(rows[-1]), flush=True)
    pool.close()
    whole = sum(found["parity"] and not found.get("without_rule") for found in rows)
    if options.json:
        print(json.dumps({"models": rows, "num_whole": whole}))
    else:
        print(f"{whole} of {len(rows)} models whole: captured, every op with a rule, equal to one process")


if __name__ == "__main__":
    main()
