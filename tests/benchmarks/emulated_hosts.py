"""Hosts on one machine: network namespaces joined by a bridge, each behind a link of a limited rate. Needs root.

The kernel has no netem here, so that links have a rate (`tc tbf`) and no latency of their own. Segments are kept
small, for a bucket that holds a whole 64 KiB segment would let short messages through for nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

SUBNET = "10.213.7"
INTERFACE = "host0"  # as each host calls its only link
SEGMENT_BYTES = 16_384
BURST_BYTES = 40_000  # of a bucket: more than a segment, and less than two milliseconds at 200 Mb/s
QUEUE_BYTES = 32 * 2**20  # so that nothing is dropped
PORT = 29_531


def why_not() -> str | None:
    """What this machine lacks to emulate hosts; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if lacking:
        return f"{' and '.join(lacking)} cannot be found (Debian: apt-get install iproute2)"
    try:
        with Hosts(1) as hosts:
            hosts.limit(100.0)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this machine does not let root make namespaces and limit their links: {error}"
    return None


class Hosts:
    """`count` namespaces on a bridge of their own; none is left after the `with` block, however it ends.

    Names hold this process's number, so that two of these do not meet.
    """

    def __init__(self, count: int) -> None:
        self.count, self._mark = count, f"ap{os.getpid() % 100_000}"
        self._children: list[subprocess.Popen[bytes]] = []

    @property
    def names(self) -> list[str]:
        return [f"{self._mark}-{i}" for i in range(self.count)]

    @property
    def bridge(self) -> str:
        return f"{self._mark}br"

    def __enter__(self) -> Hosts:
        self._before = signal.signal(signal.SIGTERM, _stop)
        try:
            _run("ip", "link", "add", self.bridge, "type", "bridge")
            _run("ip", "link", "set", self.bridge, "up")
            for i, name in enumerate(self.names):
                port = f"{self._mark}p{i}"
                _run("ip", "netns", "add", name)
                _run("ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
                small = ("gso_max_size", str(SEGMENT_BYTES), "gro_max_size", str(SEGMENT_BYTES))
                _run("ip", "link", "set", port, "master", self.bridge, *small, "up")
                _run("ip", "-n", name, "address", "add", f"{SUBNET}.{i + 1}/24", "dev", INTERFACE)
                _run("ip", "-n", name, "link", "set", INTERFACE, *small, "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_children()
        for name in self.names:
            subprocess.run(("ip", "netns", "delete", name), capture_output=True, check=False)
        for i in range(self.count):  # gone with its peer, unless the namespace was never made
            subprocess.run(("ip", "link", "delete", f"{self._mark}p{i}"), capture_output=True, check=False)
        subprocess.run(("ip", "link", "delete", self.bridge), capture_output=True, check=False)
        signal.signal(signal.SIGTERM, self._before)

    def limit(self, megabits_per_s: float) -> None:
        """Let each host send and receive so much at most, each way by itself."""
        shape = ("root", "tbf", "rate", f"{megabits_per_s:g}mbit", "burst", str(BURST_BYTES),
                 "limit", str(QUEUE_BYTES))
        for i, name in enumerate(self.names):
            _run("tc", "qdisc", "replace", "dev", f"{self._mark}p{i}", *shape)
            _run("tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, *shape)

    def run(self, script: Path, arguments: Sequence[str], limit_s: float, log: Path) -> None:
        """Run the script on every host at once, as the ranks of one job; RuntimeError where one fails or hangs."""
        logs = [log.with_name(f"{log.name}.{i}") for i in range(self.count)]
        for i, name in enumerate(self.names):
            with logs[i].open("wb") as out:
                self._children.append(subprocess.Popen(
                    ("ip", "netns", "exec", name, sys.executable, "-W", "ignore", str(script), *arguments),
                    env={**os.environ, **self._variables(i)}, stdout=out, stderr=subprocess.STDOUT,
                    start_new_session=True,
                ))
        deadline = time.monotonic() + limit_s
        try:
            while any(child.poll() is None for child in self._children):
                failed = next((i for i, child in enumerate(self._children) if child.poll()), None)
                if failed is not None:
                    raise RuntimeError(f"host {failed} failed:\n{logs[failed].read_text()[-3000:]}")
                if time.monotonic() > deadline:
                    said = logs[0].read_text()[-1000:]
                    raise RuntimeError(f"the hosts did not end within {limit_s:.0f} s; the first said:\n{said}")
                time.sleep(0.1)
            failed = next((i for i, child in enumerate(self._children) if child.poll()), None)
            if failed is not None:
                raise RuntimeError(f"host {failed} failed:\n{logs[failed].read_text()[-3000:]}")
        finally:
            self._end_children()

    def _variables(self, rank: int) -> Mapping[str, str]:
        return {
            "RANK": str(rank), "WORLD_SIZE": str(self.count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": f"{SUBNET}.1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        }

    def _end_children(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
        for child in self._children:
            child.wait()
        self._children.clear()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt
