"""Pools of gloo processes and a pretended cluster that tests of several rooms share."""

import importlib

from autopar.cluster.cluster import Cluster, DeviceType, Link, Node
from autopar.runtime.local import LocalPool


class KeptPool:
    """A pool that is started when it is first asked for, and again after a test has broken it."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._pool: LocalPool | None = None

    def get(self) -> LocalPool:
        if self._pool is None or self._pool.is_closed:
            importlib.import_module("transformers.modeling_utils")  # what is here is imported once for all workers
            self._pool = LocalPool(self._num_ranks)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def slow_cluster(num_devices: int) -> Cluster:
    """Devices so slow, on links so fast, that splitting even these tiny models over a tensor axis pays."""
    device = DeviceType(
        name="slow", memory_bytes=2**30, memory_bandwidth_bytes_per_s=1e9, kernel_launch_s=5e-7,
        peak_flops=(("float32", 1e7), ("float64", 5e6), ("bfloat16", 2e7)),
    )
    link = Link(name="fast", latency_s=1e-8, bandwidth_bytes_per_s=1e11)
    return Cluster(name="slow", nodes=(Node(device=device, num_devices=num_devices, link=link, network=link),))
