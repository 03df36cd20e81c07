"""Random legal plans of six model families against one process: losses, every gradient, and three optimizer steps.

    python tests/benchmarks/bench_fuzz.py [--plans 300] [--first 0] [--most-ranks 6] [--compile] [--json]

Every plan is drawn from all that the verifier passes, not from those that the planner would choose: cuts, meshes,
shares of rows, schedules and lists of actions, splits of ops, what layers keep, offload, rewrites. It runs on 2 to 6
gloo processes, which are started once. A line a failure, then how many passed, by family and by feature, with the
largest relative error. A plan is drawn again from its number alone: `--first N --plans 1`. `--compile`: the same plans
with their blocks compiled (by torch.compile, but for its kernels).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from fuzz import WORLDS, Case, case, check, drawn

from autopar.errors import InputError
from autopar.runtime.local import LocalPool


def row(of: Case, pool: LocalPool, *, compiled: bool) -> dict[str, Any]:
    """One plan: whether it ran to one process's numbers, was refused by the runtime, or failed."""
    began = time.perf_counter()
    plan = drawn(of)
    found: dict[str, Any] = {
        "case": str(of), "family": of.family, "dtype": of.dtype, "features": sorted(plan.features),
        "refused": list(plan.refused), "outcome": "failed",
    }
    try:
        result = check(of, plan, pool, compiled=compiled)
        found |= {"loss_error": result.loss_error, "error": result.worst[1], "worst": result.worst[0],
                  "outcome": "equal" if result.passed else "wrong"}
    except InputError as error:
        found |= {"outcome": "refused", "why": str(error)}
    except Exception as error:  # whatever a plan's run raises is what is looked for
        found["why"] = str(error)
        found["trace"] = "\n".join(getattr(error, "__notes__", ()))
    return found | {"seconds": time.perf_counter() - began}


def summary(rows: list[dict[str, Any]]) -> str:
    """The table by family, dtype and feature."""
    lines = [f"{'':<24} {'plans':>6} {'equal':>6} {'largest error':>14}"]
    groups: dict[str, list[dict[str, Any]]] = {"all": rows}
    for word in ("family", "dtype"):
        for name in sorted({found[word] for found in rows}):
            groups[name] = [found for found in rows if found[word] == name]
    counts = Counter(feature for found in rows for feature in found["features"])
    for feature in sorted(counts):
        groups[feature] = [found for found in rows if feature in found["features"]]
    for name, own in groups.items():
        errors = [max(found["error"], found["loss_error"]) for found in own
                  if "error" in found and (name == "float32" or found["dtype"] == "float64")]
        equal = sum(found["outcome"] == "equal" for found in own)
        lines.append(f"{name:<24} {len(own):6d} {equal:6d} {max(errors, default=0.0):14.1e}")
    return "\n".join([*lines, "largest errors are of float64 alone, but for float32's own line"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=300, help="how many plans")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--compile", action="store_true", help="plans that compile their blocks")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--most-ranks", type=int, default=max(WORLDS), help="of a plan; other plans than without it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    worlds = tuple(world for world in WORLDS if world <= options.most_ranks)
    rows: list[dict[str, Any]] = []
    pool = LocalPool(max(worlds))
    began = time.perf_counter()
    try:
        for seed in range(options.first, options.first + options.plans):
            if pool.is_closed or len(rows) % 20 == 19:  # gloo's threads of earlier plans slow the workers down
                pool.close()
                pool = LocalPool(max(worlds))
            rows.append(found := row(case(seed, worlds=worlds), pool, compiled=options.compile))
            if options.json:
                continue
            if found["outcome"] != "equal":
                why = found.get("why") or f"loss {found['loss_error']:.1e}, {found['worst']} {found['error']:.1e}"
                print(f"{found['outcome']}: {found['case']}: {why} [{', '.join(found['features'])}]", flush=True)
            if len(rows) % 20 == 0:
                print(f"{len(rows)} plans in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted: what ran so far", file=sys.stderr)
    finally:
        pool.close()
    equal = sum(found["outcome"] == "equal" for found in rows)
    if options.json:
        print(json.dumps({"plans": rows, "num_equal": equal}))
    else:
        print(summary(rows))
        print(f"{equal} of {len(rows)} plans equal to one process, in {time.perf_counter() - began:.0f} s")
    sys.exit(equal != len(rows))


if __name__ == "__main__":
    main()
