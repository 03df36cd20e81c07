"""Groups have one worker thread: two of them corrupt the heap (see autopar.gloo)."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from test_checkpoint import make_trainer
from test_several_axes import plan_of
from torch.distributed import distributed_c10d

from autopar.gloo import num_worker_threads, one_worker_thread
from autopar.plan.plan import Plan
from autopar.runtime.local import LocalPool

pytestmark = pytest.mark.processes


def threads_of_all_groups(plan: Plan) -> list[int]:
    """The worker threads of every group that a trainer made, and of the pool's own."""
    trainer = make_trainer("llama", plan, seed=0, learning_rate=0.1)
    found = [num_worker_threads(group) for group in distributed_c10d._world.pg_map]
    trainer.close()
    return found


def plain_and_one() -> tuple[int, int, bool]:
    plain = dist.new_group([0, 1])
    with one_worker_thread():
        one = dist.new_group([0, 1])
    assert plain is not None and one is not None
    restored = distributed_c10d.ProcessGroupGloo is dist.ProcessGroupGloo
    return num_worker_threads(plain), num_worker_threads(one), restored


def test_all_groups_of_a_trainer_have_one_worker(pool: LocalPool) -> None:
    for found in pool.run(threads_of_all_groups, plan_of("llama", "cp2xfsdp2"), num_ranks=4):
        assert len(found) > 3 and set(found) == {1}


def test_other_groups_are_left_as_they_are(pool: LocalPool) -> None:
    assert pool.run(plain_and_one, num_ranks=2) == [(2, 1, True)] * 2


def test_the_asked_interface_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts whose own name resolves to the loopback can only meet over the interface that the user names."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with one_worker_thread():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-link")
    with one_worker_thread(), pytest.raises(RuntimeError, match="no-such-link"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
