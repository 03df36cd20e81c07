"""A local pool whose processes die, fail or hang ends with one line and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from autopar.errors import InputError
from autopar.runtime.local import LocalPool, LocalRunError, run_local

pytestmark = pytest.mark.processes


def sum_of_ranks(extra: int) -> float:
    total = torch.tensor(float(dist.get_rank() + extra))
    dist.all_reduce(total)
    return total.item()


def pid_then(what: str) -> int:
    """Rank 1 does what it is told; rank 0 waits for it."""
    if dist.get_rank() == 1:
        match what:
            case "die":
                os._exit(3)
            case "fail":
                raise RuntimeError("first line\nthe last line")
            case "refuse":
                raise InputError("the batch is wrong; give another")
            case "hang":
                time.sleep(600)
    dist.barrier()
    return os.getpid()


def test_one_pool_runs_many_functions_on_any_number_of_ranks() -> None:
    with LocalPool(3) as pool:
        assert pool.run(sum_of_ranks, 0) == [3.0, 3.0, 3.0]
        assert pool.run(sum_of_ranks, 1, num_ranks=2) == [3.0, 3.0]
        assert pool.run(sum_of_ranks, 5, num_ranks=1) == [5.0]
        with pytest.raises(LocalRunError, match="4 processes were asked of a pool that has 3"):
            pool.run(sum_of_ranks, 0, num_ranks=4)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("die", LocalRunError, "rank 1, running pid_then: died with exit code 3"),
        ("fail", LocalRunError, "rank 1, running pid_then: the last line"),
        ("refuse", InputError, "the batch is wrong; give another"),
        ("hang", LocalRunError, "rank 0, 1 of 2 did not finish pid_then within 8 s"),
    ],
)
def test_a_bad_rank_ends_the_pool(what: str, error: type[Exception], message: str) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    start = time.monotonic()
    with LocalPool(2) as pool:
        pids = pool.run(pid_then, "nothing")
        with pytest.raises(error) as caught:
            pool.run(pid_then, what, timeout_s=8)
        assert str(caught.value) == message
        assert pool.is_closed
    assert not any(psutil.pid_exists(pid) for pid in pids)
    left = {child.pid for child in psutil.Process().children(recursive=True)} - before
    servers = ("resource_tracker", "forkserver")  # multiprocessing's own; they end with this process
    assert all(any(name in " ".join(psutil.Process(pid).cmdline()) for name in servers) for pid in left)
    assert time.monotonic() - start < 90


def test_no_process_outlives_the_one_that_started_the_pool(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "from test_local import pid_then\nfrom autopar.runtime.local import LocalPool\n"
        "if __name__ == '__main__':\n"
        "    pool = LocalPool(2)\n"
        "    print(*pool.run(pid_then, 'nothing'), flush=True)\n"
        "    pool.run(pid_then, 'hang')\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))


def told(name: str) -> tuple[str | None, str | None, int, int]:
    return os.environ.get(name), os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads(), os.getppid()


def test_workers_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a pool that is forked from a server which an earlier pool started."""
    parents = []
    for value in ("one", "two"):
        monkeypatch.setenv("AUTOPAR_TEST_LOCAL", value)
        with LocalPool(1, num_threads=2) as pool:
            ((found, *threads, parent),) = pool.run(told, "AUTOPAR_TEST_LOCAL")
        assert (found, *threads) == (value, "2", 2)
        parents.append(parent)
    monkeypatch.delenv("AUTOPAR_TEST_LOCAL")
    with LocalPool(1) as pool:
        assert pool.run(told, "AUTOPAR_TEST_LOCAL")[0][:3] == (None, "1", 1)
    assert parents[0] == parents[1] and (parents[0] != os.getpid()) == (sys.platform == "linux")


def threads_before_fully_sharded() -> int:
    """How many threads the worker has; then a fully sharded model is made, run and dropped."""
    threads = psutil.Process().num_threads()
    mesh = init_device_mesh("cpu", (2,))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    model(torch.ones(2, 4)).sum().backward()
    return threads


def test_groups_of_earlier_runs_are_gone() -> None:
    with LocalPool(2) as pool:
        threads = [pool.run(threads_before_fully_sharded)[0] for _ in range(5)]
    assert threads[-1] == threads[1]


def test_a_pool_for_one_run() -> None:
    assert run_local(sum_of_ranks, 2, 1) == [3.0, 3.0]
