"""The cost model's kernels against measured ones: one H200, each op of the general grid, forward and backward.

    python tests/benchmarks/bench_kernels.py [--rows] [--table FILE] [--from-profile PROFILE]

The table lies in cost_models/hardware and says where it comes from. `--from-profile` makes it anew from a profile that
`autopar profile ops --grid --dtype bf16` wrote on the device. A line a family: how many sizes, mean absolute error and
bias of what data sheets and efficiency curves say.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.cluster.tables import preset
from autopar.cost_models import efficiency
from autopar.cost_models.compute import OpTime, op_time_s
from autopar.cost_models.measured import local_tensor
from autopar.graph.assemble import overload_of
from autopar.graph.measure import measure, storage_key
from autopar.graph.model_graph import Ref
from autopar.profiler.file import load_profile
from autopar.profiler.op_cases import OpCase, grid_cases
from autopar.profiler.profile import sample_key

TABLE = efficiency.PATH.parent / "kernels-H200.csv"
COLUMNS = ("op", "shapes", "forward_us", "backward_us", "forward_spread", "backward_spread")


def shapes(case: OpCase) -> str:
    return " ".join("x".join(map(str, item.tensor.shape)) or "1" for item in case.operands)


def write_table(path: Path, profile_path: Path) -> None:
    """The grid's samples of a profile, with where they come from."""
    profile = load_profile(profile_path)
    sample = {sample_key(one): one for one in profile.ops.samples}
    with path.open("w", newline="") as file:
        file.write(
            f"# {profile.machine}, torch {profile.torch_version}, {profile.date}: `autopar profile ops --grid --dtype "
            "bf16`, medians of CUDA events over kernels that wait in the queue, bfloat16\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for case in grid_cases("bfloat16", device_type="cuda"):
            one = sample.get(case.key)
            if one is not None:
                writer.writerow([
                    case.target, shapes(case), f"{one.forward_s * 1e6:.3f}", f"{one.backward_s * 1e6:.3f}",
                    f"{one.forward_spread:.3f}", f"{one.backward_spread:.3f}",
                ])


def modelled(case: OpCase, device_name: str) -> OpTime:
    """What the cost model says of a case, without measurements."""
    with FakeTensorMode():
        made = {
            name: torch.empty(item.tensor.shape, dtype=getattr(torch, item.tensor.dtype)).requires_grad_(
                item.tensor.requires_grad)
            for name, item in zip(case.op.operands, case.operands, strict=True)
        }
        args = tuple(made[arg.name] if isinstance(arg, Ref) else list(arg) if isinstance(arg, tuple) else arg
                     for arg in case.op.args)
        found = measure(overload_of(case.target), args, {})
        own = {storage_key(tensor) for tensor in made.values()}
        results = found.result if isinstance(found.result, tuple | list) else (found.result,)
        own.update(storage_key(tensor) for tensor in results if isinstance(tensor, torch.Tensor))
        extra = sum(saved.numel() * saved.element_size() for saved in found.saved if storage_key(saved) not in own)
        kept = sum(saved.numel() * saved.element_size() for saved in found.saved) - extra
    return op_time_s(
        case.op, [local_tensor(item.tensor) for item in case.operands], [local_tensor(item) for item in case.outputs],
        preset(device_name).device, case.dtype, flops=found.flops, backward_flops=found.backward_flops,
        saved_bytes=kept, extra_bytes=found.extra_bytes + extra,
    )


def compared(table: Path) -> Iterator[tuple[OpCase, OpTime, OpTime]]:
    """Each case of the table: what was measured, and what the model says."""
    with table.open() as file:
        rows = {(row["op"], row["shapes"]): row for row in csv.DictReader(line for line in file if line[0] != "#")}
    device = table.stem.removeprefix("kernels-")
    for case in grid_cases("bfloat16", device_type="cuda"):
        row = rows.get((case.target, shapes(case)))
        if row is not None:
            yield case, OpTime(float(row["forward_us"]) / 1e6, float(row["backward_us"]) / 1e6), modelled(case, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="print every size too")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--from-profile", type=Path, default=None)
    options = parser.parse_args()
    if options.from_profile is not None:
        write_table(options.table, options.from_profile)
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for case, seen, said in compared(options.table):
        for way, one, other in (("forward", seen.forward_s, said.forward_s),
                                ("backward", seen.backward_s, said.backward_s)):
            if one > 0 and other > 0:
                errors[case.target.removeprefix("aten."), way].append(other / one - 1)
                if options.rows:
                    print(f"{case.target:45} {way:8} {shapes(case):50} {one * 1e6:9.1f} us {other / one - 1:+7.1%}")
            elif max(one, other) > 0 and options.rows:
                print(f"{case.target:45} {way:8} {shapes(case):50} {one * 1e6:9.1f} us, said {other * 1e6:.1f} us")
    print(f"{'op':45} {'way':8} {'sizes':>5} {'error':>7} {'bias':>7}")
    for (name, way), found in sorted(errors.items()):
        print(f"{name:45} {way:8} {len(found):5} {fmean(map(abs, found)):7.1%} {fmean(found):+7.1%}")
    everything = [error for found in errors.values() for error in found]
    print(f"{'all':45} {'':8} {len(everything):5} {fmean(map(abs, everything)):7.1%} {fmean(everything):+7.1%} "
          f"(geometric mean of the ratios {math.exp(fmean(math.log(1 + error) for error in everything)):.2f})")


if __name__ == "__main__":
    main()
