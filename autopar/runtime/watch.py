"""Who stopped: when a rank dies, raises or hangs, the others end with one line that names it.

Each rank says twice a second, in the job's store, how far its main thread is. A rank whose communication fails or times
out reads what the others said last and decides. The one place that asks torch for the default store.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from autopar.errors import AutoparError, RankFailedError

BEAT_S = 0.5
LEAVING_S = 5.0  # at most, for a last word to a store that does not answer
DECIDE_S = 4 * BEAT_S  # a rank that gave no sign for so long is gone
_LOST = ("connection", "broken pipe", "timed out", "timeout", "pair closure", "socket", "gloo", "nccl", "store")
_OWN_WAITS = frozenset((
    "executor.py", "collectives.py", "replicas.py", "tied.py", "clipping.py", "checkpoint.py", "halo.py",
    "ring_attention.py", "expert_exchange.py", "step_checks.py",
))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """What a rank says of itself. `waits`: its main thread is in communication; `lost`: it ends since others did."""

    beat: int = 0
    step: int = 0
    still_s: float = 0.0
    where: str = ""
    waits: bool = False
    lost: bool = False
    failed: str = ""


class Watch:
    """Watches all ranks of the job from this one. All ranks make it together; alone there is nothing to watch."""

    def __init__(self, *, alone: bool = False) -> None:
        self.step, self._moved = 0, time.monotonic()
        self._stop = threading.Event()
        self._leave: Callable[[], None] = self._stop.set
        alone = alone or not dist.is_initialized()
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        if self.size == 1:
            return
        box = [uuid.uuid4().hex]
        dist.broadcast_object_list(box, src=0)
        store = distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"autopar/watch/{box[0]}", store)  # type: ignore[attr-defined]
        self._last, self._words = Sign(), dict[str, Any]()
        self._say(self._last)
        dist.barrier()  # from here on every rank's sign is there to be read
        self._main = threading.get_ident()
        thread = threading.Thread(target=_beat, args=(weakref.ref(self), self._stop), daemon=True)
        thread.start()
        self._leave = partial(end_beat, self._stop, thread)
        atexit.register(self._leave)

    def close(self) -> None:
        """Say nothing any more."""
        self._leave()
        atexit.unregister(self._leave)

    def moved(self) -> None:
        """The main thread got on."""
        self._moved = time.monotonic()

    @contextmanager
    def names_failures(self) -> Iterator[None]:
        """Inside, a failure of communication becomes a RankFailedError that names the rank at fault."""
        self.moved()
        if self.size == 1:
            yield
            return
        self._words = {}
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            is_lost = isinstance(error, RuntimeError) and any(word in text.lower() for word in _LOST)
            if isinstance(error, AutoparError) or not is_lost:
                self._end(failed=f"{type(error).__name__}: {text[:300]}")
                raise
            self._end(lost=True)
            raise RankFailedError(f"{self._culprit()}; this rank ({self.rank}) stops too") from error
        self.moved()

    # -- signs

    def _end(self, **words: Any) -> None:
        """Say why this rank leaves what all do; it may come back, where its caller knows what to do."""
        self._words = words
        self._say(replace(self._last, step=self.step, **words))

    def _say(self, sign: Sign) -> None:
        try:
            self._store.set(str(self.rank), json.dumps(asdict(sign)))
        except (RuntimeError, OSError):
            self._stop.set()  # whoever held the store is gone

    def _sign(self) -> Sign:
        frame = sys._current_frames().get(self._main)
        return Sign(
            beat=self._last.beat + 1, step=self.step, still_s=time.monotonic() - self._moved, where=_place(frame),
            waits=_is_waiting(frame), **self._words,
        )

    def _read(self) -> dict[int, Sign]:
        """What the other ranks said last."""
        found = {}
        for rank in range(self.size):
            if rank != self.rank:
                found[rank] = Sign(**json.loads(self._store.get(str(rank))))
        return found

    # -- the verdict

    def _culprit(self) -> str:
        try:
            first = self._read()
            began = time.monotonic()
            while True:
                signs = self._read()
                for rank, sign in signs.items():
                    if sign.failed:
                        return f"rank {rank} failed in step {sign.step}: {sign.failed}"
                if time.monotonic() - began > DECIDE_S:
                    break
                time.sleep(BEAT_S / 2)
        except (RuntimeError, OSError):
            return "the job's store is gone, and with it most likely rank 0 or its launcher"
        return verdict(first, signs)


def verdict(before: dict[int, Sign], after: dict[int, Sign]) -> str:
    """Who is at fault, from two looks at all other ranks, DECIDE_S apart: a dead rank, else the one that hangs."""
    silent = [rank for rank, sign in after.items() if sign.beat == before[rank].beat and not sign.lost]
    if silent:
        rank = silent[0]
        where = f" at {after[rank].where}" if after[rank].where else ""
        return f"rank {rank} died: its last sign came from step {after[rank].step}{where}"
    others = {rank: sign for rank, sign in after.items() if not sign.lost}
    if not others:
        return "communication failed on every rank: see the first error"
    least = min(sign.step for sign in others.values())
    behind = {rank: sign for rank, sign in others.items() if sign.step == least}
    rank = min(behind, key=lambda one: (behind[one].waits, -behind[one].still_s, one))
    sign = behind[rank]
    return f"rank {rank} hangs: it has not moved for {sign.still_s:.0f} s, in step {sign.step} at {sign.where}"


def end_beat(stop: threading.Event, thread: threading.Thread) -> None:
    """Ends a beat and waits for it: a daemon thread that is in C++ as Python ends takes the process down with it."""
    stop.set()
    thread.join(timeout=LEAVING_S)


def _beat(reference: weakref.ref[Watch], stop: threading.Event) -> None:
    """Says how the main thread is, until the watch is closed or forgotten."""
    while not stop.wait(BEAT_S):
        watch = reference()
        if watch is None:
            return
        sign = watch._sign()
        if not stop.is_set():
            watch._last = sign
            watch._say(sign)
        del watch


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_waiting(frame: FrameType | None) -> bool:
    """Whether one of the innermost frames is of communication."""
    for _ in range(4):
        if frame is None:
            return False
        path = Path(frame.f_code.co_filename)
        if "torch/distributed" in path.as_posix() or (path.parent.name == "runtime" and path.name in _OWN_WAITS):
            return True
        frame = frame.f_back
    return False
