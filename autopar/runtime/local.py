"""Functions on local gloo processes: one pool, started once, that runs one function after another.

Workers are forked from one server process that has imported torch and the runtime and does nothing else, so that a
pool pays for those imports once and not in every rank, and a second pool not at all. Every call makes a new default
process group over the first `num_ranks` workers and destroys it afterwards. A worker that dies, raises or takes too
long ends the whole pool, with one line that names its rank.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from autopar.errors import AutoparError

_RELEASE = b"release"
# What every training step imports sooner or later; and what is worth having where the caller has it.
_PRELOADED = ("autopar.runtime.parity", "torch._dynamo", "torch.distributed.checkpoint")
_PRELOADED_IF_USED = ("transformers.modeling_utils",)
_ECHOES = ("Connection closed", "Connection reset", "Broken pipe")  # what survivors say when another rank is gone


class LocalRunError(AutoparError, RuntimeError):
    """A local process failed; the message names its rank."""


class LocalPool:
    """`num_ranks` new processes. Use it in a `with`: leaving it ends them all.

    The functions that `run` takes must be importable (module level), their arguments and results picklable. Workers
    have this process's environment as it is now. With `preloaded` they are forked from a server that has imported
    torch (on Linux; elsewhere that is not safe) and share its hash seed; without it each is an interpreter of its own.
    """

    def __init__(self, num_ranks: int, *, num_threads: int = 1, preloaded: bool = True) -> None:
        self.num_ranks = num_ranks
        self._folder = tempfile.TemporaryDirectory(prefix="autopar-local-")
        self._round = 0
        context = _context(preloaded)
        self._pipes: list[Connection] = []
        self._workers: list[Any] = []
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
        environment = {**os.environ, **threads}
        before = {name: os.environ.get(name) for name in threads}
        os.environ.update(threads)  # read when torch is imported, by the server or by a child of its own
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe()
                worker = context.Process(
                    target=_work, args=(theirs, rank, environment), name=f"autopar-rank-{rank}", daemon=True
                )
                worker.start()
                theirs.close()
                self._pipes.append(ours)
                self._workers.append(worker)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *args: Any, num_ranks: int | None = None, timeout_s: float = 300.0
    ) -> list[Any]:
        """The results of `function(*args)` on ranks 0 to num_ranks - 1, in order of rank.

        An AutoparError that a rank raised is raised here as it is; anything else becomes a LocalRunError.
        """
        count = self.num_ranks if num_ranks is None else num_ranks
        if not 1 <= count <= len(self._workers):
            raise LocalRunError(f"{count} processes were asked of a pool that has {len(self._workers)}")
        self._round += 1
        store = str(Path(self._folder.name) / f"store-{self._round}")
        task = pickle.dumps((function, args, count, store, timeout_s))
        try:
            for rank in range(count):
                self._pipes[rank].send_bytes(task)
            return self._collect(count, timeout_s, getattr(function, "__name__", "a function"))
        except BaseException:
            self.close()
            raise

    def _collect(self, count: int, timeout_s: float, what: str) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, tuple[BaseException | None, str]] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) + len(failures) < count:
            left = deadline - time.monotonic()
            missing = [rank for rank in range(count) if rank not in results and rank not in failures]
            if left <= 0:
                if failures:
                    break
                named = ", ".join(map(str, missing))
                raise LocalRunError(f"rank {named} of {count} did not finish {what} within {timeout_s:.0f} s")
            sources: dict[Any, int] = {self._pipes[rank]: rank for rank in missing}
            for ready in wait(list(sources), timeout=left):
                rank = sources[ready]
                try:
                    kind, value, text = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._workers[rank].join(5)
                    failures[rank] = (None, f"died with exit code {self._workers[rank].exitcode}")
                    kind = None
                if kind == "result":
                    results[rank] = value
                elif kind == "error":
                    failures[rank] = (value, text)
                if rank in failures:  # the others now wait for it: give them a moment to say what they know
                    deadline = min(deadline, time.monotonic() + 2.0)
        if failures:
            raise _first_cause(failures, what)
        for rank in range(count):  # nobody takes its group down while another still uses it
            self._pipes[rank].send_bytes(_RELEASE)
        return [results[rank] for rank in range(count)]

    @property
    def is_closed(self) -> bool:
        """Whether its processes have ended: after `close`, or after a failed `run`."""
        return not self._workers

    def close(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(0.5)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._pipes, self._workers = [], []
        self._folder.cleanup()


def _context(preloaded: bool) -> Any:
    """How workers are started."""
    if not preloaded or sys.platform != "linux":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    # Has an effect until the server runs, which then stays until this process ends.
    context.set_forkserver_preload([*_PRELOADED, *(name for name in _PRELOADED_IF_USED if name in sys.modules)])
    return context


def _first_cause(failures: dict[int, tuple[BaseException | None, str]], what: str) -> BaseException:
    """The error to raise: a user's mistake first, then a death, then an error that is no lost connection."""

    def weight(rank: int) -> tuple[int, int]:
        error, text = failures[rank]
        if isinstance(error, AutoparError):
            return 0, rank
        if error is None and text.startswith("died"):
            return 1, rank
        return (3 if any(word in text for word in _ECHOES) else 2), rank

    rank = min(failures, key=weight)
    error, text = failures[rank]
    if isinstance(error, AutoparError):
        return error
    made = LocalRunError(f"rank {rank}, running {what}: {text.splitlines()[-1]}")
    made.add_note(text)
    return made


def run_local(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """The results of `function(*args)` on `num_ranks` new local processes joined by gloo, in order of rank."""
    with LocalPool(num_ranks) as pool:
        return pool.run(function, *args, timeout_s=timeout_s)


def _work(pipe: Connection, rank: int, environment: dict[str, str]) -> None:
    """A worker's life: take a task, run it in a process group of its own, answer, be released; end with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts them all; the pool's owner ends its workers
    os.environ.clear()  # a server has the environment of the time when it was started
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    gc.freeze()  # what is imported stays, and need not be looked at again
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer = pickle.dumps(("result", _run_task(task, rank), ""))
        except BaseException as error:
            text = "".join(traceback.format_exception(error)).rstrip()
            answer = pickle.dumps(("error", error if isinstance(error, AutoparError) else None, text))
        try:
            pipe.send_bytes(answer)
            pipe.recv_bytes()  # _RELEASE
        except (EOFError, OSError):
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # FSDP's modules hold their groups, with their threads, in cycles


def _end_with_parent() -> None:
    """End this process when the one that started the pool is gone, even in the middle of a collective."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_task(task: bytes, rank: int) -> Any:
    import torch.distributed as dist

    from autopar.gloo import one_worker_thread

    function, args, count, path, timeout_s = pickle.loads(task)
    store = dist.FileStore(path, count)  # type: ignore[attr-defined] # torch does not list it as its own
    # Ranks that wait for a dead one must not outlive the pool's own patience.
    with one_worker_thread():
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout_s)
        )
    return function(*args)
