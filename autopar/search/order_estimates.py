"""What pipelines take in orders that wait less than 1F1B while a pipeline fills and drains, all activations kept.

1F1B's bounds say little of them. With f, i and w what a forward and both parts of a backward take on a stage, and b the
whole backward, zero-bubble takes m (f + i + w) + (p - 1) (f + i - w) where stages are alike, and interleaved with v
stages on each rank m (f + b) + (p - 1) (f + b) / v (`simulate/closed_form.py`). Where they are not alike, each stage of
a cut has its own path through zero-bubble, whose length follows from its range of blocks alone, for all blocks before
it are passed there and back. So the cut with the shortest longest path is found exactly. Layers that recompute or
offload cannot have their backwards split; nor can they under ZeRO 3 or where blocks are compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from autopar.search.balance import smallest_bottleneck
from autopar.search.block_table import BlockTable, Sorts
from autopar.search.candidates import Candidate, PlanRequest, Work
from autopar.search.elimination import Table
from autopar.search.memory_bounds import MemoryBounds
from autopar.search.range_loads import RangeLoads
from autopar.search.stage_kinds import StageKind, StageLayout
from autopar.search.stage_tables import StageTables
from autopar.search.work_bounds import WorkBounds

CHUNKS = (2, 4)  # stages on a device
MOST_CHUNKS = max(CHUNKS)


class OrderEstimates:
    """Estimates of a request's pipelines of several stages that are alike, from roughest to closest."""

    def __init__(
        self, layout: StageLayout, request: PlanRequest, tables: StageTables, memory: MemoryBounds, ranges: RangeLoads,
        work: WorkBounds, sorts: Sorts, sends_s: Callable[[Candidate], Table],
    ) -> None:
        """`sorts`: of chains of several stages; `sends_s`: by stage what links behind it take at least, both ways."""
        self._layout, self._request, self._tables, self._memory = layout, request, tables, memory
        self._ranges, self._work, self._sorts, self._sends_s = ranges, work, sorts, sends_s
        self._layers = np.array(sorts.is_layer)
        self._num_layers, self._num_blocks = int(sorts.number[self._layers].sum()), len(sorts.sort)
        self._of_work: dict[Work, float] = {}

    def known(self, c: Candidate) -> bool:
        """Whether there are estimates of it."""
        return c.pp > 1 and c.num_micro_batches > 1 and len(set(self._layout.kinds(c))) == 1

    def rough(self, c: Candidate) -> float:
        """What it takes by its rows alone (`WorkBounds.rough_times`), where w is no more than i."""
        forward_s, backward_s = self._work.rough_times(c)
        share = 1 / c.pp
        if self._num_layers:  # some stage has no fewer layers than all have on average
            share = max(share, math.ceil(self._num_layers / c.pp) / self._num_blocks)
        waits = min(forward_s, (forward_s + backward_s) / MOST_CHUNKS)
        return c.num_micro_batches * share * (forward_s + backward_s) + (c.pp - 1) / c.pp * waits

    def of_work(self, c: Candidate) -> float:
        """The same by what the blocks take at the candidate's rows, with nothing of data axes."""
        if (found := self._of_work.get(work := c.work)) is None:
            found = self._of_work[work] = self._make_of_work(c)
        return found

    def _make_of_work(self, c: Candidate) -> float:
        blocks, number = self._tables.blocks(c, self._layout.kinds(c)[0]), self._sorts.number
        m, p, work = c.num_micro_batches, c.pp, blocks.forward_s + blocks.backward_s
        longest = float(work @ number) / p
        if self._num_layers:
            longest = max(longest, math.ceil(self._num_layers / p) * float(work[self._layers].min()))
        waits = blocks.forward_s + np.maximum(0.0, blocks.backward_s - 2 * blocks.weights_s)
        return m * longest + (p - 1) / p * min(float(waits @ number), float(work @ number) / MOST_CHUNKS)

    def with_ends(self, c: Candidate) -> float:
        """The same with what stages do once a step, shared evenly."""
        table = self._tables.times(c, self._layout.kinds(c)[0])
        return self.of_work(c) + float(table.once_s @ self._sorts.number) / c.pp

    def keeps_all(self, c: Candidate) -> bool:
        """Whether the stages have room for all layers with all activations; a necessary condition."""
        kind = self._layout.kinds(c)[0]
        blocks = self._tables.blocks(c, kind)
        return self._memory.layers_fit(c, (kind,) * c.pp, {kind: blocks}, kept=True)

    def best_cut(self, c: Candidate) -> tuple[float, tuple[int, ...]] | None:
        """The least time of all cuts that keep everything, and the cut, of zero-bubble; None where none fits."""
        if c.zero == 3 or self._request.compile:
            return None
        kind, sorts, m, stage = self._layout.kinds(c)[0], self._sorts, c.num_micro_batches, np.arange(c.pp)
        blocks = self._tables.blocks(c, kind)
        ahead = np.minimum(c.pp - 1 - stage, m)
        late = np.minimum(stage, m - ahead)  # micro-batches by which gradients of weights come after those of inputs
        keeps_all = self._memory.room(c, kind, np.minimum(ahead + late + 1, m)[:, None], blocks)[1]
        where = sorts.where(list(np.where(keeps_all, 0.0, np.inf)))
        if where is None:
            return None
        times = self._ranges.times(c, kind, self._tables.times(c, kind))
        weights = self._weights(c, kind, blocks)
        put_off = np.where(stage[:, None] > 0, sorts.sums(weights), 0.0)  # the first stage's backward is not split
        work = m * (times.forward_s + times.backward_s)
        alone = np.where(keeps_all, work + times.once_s - times.start_beside_s, np.inf)
        back = np.where(keeps_all, work - np.minimum(late + 1, m)[:, None] * put_off, np.inf)
        alone, back = sorts.windows(list(alone), where), sorts.windows(list(back), where)
        starts = sorts.windows([times.start_beside_s] * c.pp, where)
        sends = self._sends_s(c)
        passed = (sends[0] - sends)[:, None] / 2  # on links, each way
        firsts = np.minimum(where.starts[:-1, None] + np.arange(where.size), len(sorts.sort))
        arrives, returns = (
            (_running(own[sorts.sort])[firsts] + passed)[:, :, None]
            for own in (blocks.forward_s, blocks.backward_s - blocks.weights_s)
        )
        begins = np.maximum(arrives, np.where(np.isfinite(starts), starts, 0.0))
        found = smallest_bottleneck(np.maximum(begins + alone, begins + back + returns), starts=where.starts)
        return None if found is None else (found.value, found.cuts)

    def interleaved(self, c: Candidate, num_chunks: int, cuts: Sequence[int]) -> float:
        """Its time with so many stages on each rank, cut like this; infinite where not all activations fit."""
        kind, p, m = self._layout.kinds(c)[0], c.pp, c.num_micro_batches
        blocks = self._tables.blocks(c, kind)
        ranges = [int(self._sorts.ranges[span]) for span in pairwise(cuts)]

        def by_rank(of_sort: Table) -> Table:
            return np.asarray(of_sort[ranges].reshape(num_chunks, p))

        warmup = np.minimum((p - 1 - np.arange(p)) * 2 + (num_chunks - 1) * p, m * num_chunks)
        held = (warmup + 1) / num_chunks  # micro-batches of each of a rank's stages
        need = by_rank(self._memory.all_kept(c, np.array(1), blocks)) + (held - 1) * by_rank(blocks.all_kept[0])
        if (need.sum(axis=0) > kind.memory_limit_bytes).any():
            return math.inf
        times = self._ranges.times(c, kind, self._tables.times(c, kind))
        work, starts = by_rank(times.forward_s + times.backward_s), by_rank(times.start_beside_s)
        ends = by_rank(times.once_s - times.start_beside_s)[0]  # what a rank's first stage, its last to end, does then
        waits = (p - 1) / p * float(work.sum()) / num_chunks
        # A round of micro-batches passes all ranks' first stages, then all second ones, each as quick as the slowest.
        return float((starts.sum(axis=0) + ends).max()) + m * float(work.max(axis=1).sum()) + waits

    def _weights(self, c: Candidate, kind: StageKind, blocks: BlockTable) -> Table:
        """The seconds of each block's backward that can be put off."""
        adding = self._tables.adding_s(c, kind, blocks)
        return blocks.weights_s if adding is None else blocks.weights_s + adding


def _running(each: Table) -> Table:
    """[i]: the sum of the first i."""
    return np.concatenate([[0.0], np.cumsum(each)])
