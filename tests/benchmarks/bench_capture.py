"""Time and peak memory of capturing each preset, each in a fresh process: python tests/benchmarks/bench_capture.py"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

LONGEST = {"llama-3.1-8b": 8192, "llama-3.1-70b": 8192, "llama-3.1-405b": 8192}


def measure_one(name: str) -> None:
    start = time.perf_counter()
    from autopar.graph.source import capture_source, load_source

    graph = capture_source(load_source(name, seq_len=LONGEST.get(name)))
    wall_s = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak_gib = usage.ru_maxrss / 2**20
    ops = sum(len(cls.ops) for cls in graph.classes)
    sys.stdout.write(f"{name:16} {wall_s:8.1f} {usage.ru_utime + usage.ru_stime:8.1f} {peak_gib:8.2f} "
                     f"{graph.num_params / 1e9:10.2f} {len(graph.blocks):7} {len(graph.classes):8} {ops:5}\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure_one(sys.argv[1])
    else:
        from autopar.graph.source import preset_names

        sys.stdout.write(f"{'preset':16} {'wall s':>8} {'CPU s':>8} {'RSS GiB':>8} {'params 1e9':>10} {'blocks':>7} "
                         f"{'classes':>8} {'ops':>5}\n")
        sys.stdout.flush()
        for preset in preset_names():
            subprocess.run([sys.executable, __file__, preset], check=True)
