"""Lower bounds of a candidate's step by the work of all its blocks alone, which stages share evenly at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autopar.cost_models.measured import op_table
from autopar.graph.model_graph import ModelGraph
from autopar.search.candidates import Candidate, Work
from autopar.search.shardings import ShardingChooser
from autopar.search.stage_kinds import StageKind, StageLayout
from autopar.search.stage_tables import StageTables

ENDLESS_ROWS = 1 << 30  # of a micro-batch, to see what a row takes where nothing else counts
ENDLESS_ERROR = 1e-5  # relative; what is left there of launches and unfilled waves is less


class WorkBounds:
    """Bounds candidates by work; keeps them by what they depend on."""

    def __init__(
        self, graph: ModelGraph, layout: StageLayout, chooser: ShardingChooser, tables: StageTables
    ) -> None:
        self._graph, self._layout, self._chooser, self._tables = graph, layout, chooser, tables
        self._limits: dict[tuple[object, ...], tuple[tuple[float, float], tuple[float, float]]] = {}
        self._rough: dict[Work, tuple[float, float]] = {}
        self._of_work: dict[Work, float] = {}

    def rough(self, c: Candidate) -> float:
        """A bound without the costs of blocks at the candidate's rows: all rows as quick as those of endless batches.

        No device does a row of a smaller batch in less: efficiencies of products rise with the rows, and what does not
        grow with them comes on top. Nor is a micro-batch quicker than one of hardly any rows, which still launches
        every kernel and reads every weight. 0 where that is not known: times or links are measured, or rows meet rows.
        """
        return shared_work(c, *self.rough_times(c))

    def rough_times(self, c: Candidate) -> tuple[float, float]:
        """What a micro-batch takes at least through all blocks by that, forward and backward."""
        if (found := self._rough.get(work := c.work)) is None:
            found = self._rough[work] = self._make_rough(c)
        return found

    def _make_rough(self, c: Candidate) -> tuple[float, float]:
        kinds = self._layout.kinds(c)
        key = (c.tp, c.cp, c.sequence_parallel, c.split_weights, c.pp > 1, frozenset(k.compute_kind for k in kinds))
        if key not in self._limits:
            self._limits[key] = self._row_limits(c, tuple(dict.fromkeys(kinds)))
        (forward, backward), (least_forward, least_backward) = self._limits[key]
        return max(c.rows * forward, least_forward), max(c.rows * backward, least_backward)

    def of_work(self, c: Candidate) -> float:
        """A bound by what the blocks take at the candidate's rows, with nothing of data axes."""
        if (found := self._of_work.get(work := c.work)) is None:
            found = self._of_work[work] = self._make_of_work(c)
        return found

    def _make_of_work(self, c: Candidate) -> float:
        tables = [self._tables.blocks(c, kind) for kind in dict.fromkeys(self._layout.kinds(c))]
        number = tables[0].sorts.number
        forward = np.minimum.reduce([table.forward_s for table in tables])
        backward = np.minimum.reduce([table.backward_s for table in tables])
        return shared_work(c, float(forward @ number), float(backward @ number))

    def of_kind(self, c: Candidate, kind: StageKind) -> float:
        """The same where all stages are of this kind."""
        costs = self._tables.block_costs(c, kind)
        each = [costs[block.cls] for block in self._graph.blocks]
        return shared_work(
            c, sum(cost.forward_compute_s + cost.forward_tp_comm_s for cost in each),
            sum(cost.backward_compute_s + cost.backward_tp_comm_s for cost in each),
        )

    def _row_limits(self, c: Candidate, kinds: Sequence[StageKind]) -> tuple[tuple[float, float], tuple[float, float]]:
        """Seconds that a row of an endless batch takes through all blocks at least, forward and backward.

        And those that a micro-batch of hardly any rows takes.
        """
        rows = self._graph.rows
        if not self._graph.rows_are_tagged or any(
            info.numel % rows**2 == 0 for cls in self._chooser.classes for info in cls.tensors if info.numel
        ) or any(_is_measured(kind) for kind in kinds):
            return (0.0, 0.0), (0.0, 0.0)
        found = []
        for own, share in ((ENDLESS_ROWS, (1 - ENDLESS_ERROR) / ENDLESS_ROWS), (1 / ENDLESS_ROWS, 1 - ENDLESS_ERROR)):
            like = replace(c, micro_batch=max(1, round(own)), spread=max(1, round(1 / own)))
            tables = [self._tables.blocks(like, kind) for kind in kinds]
            number = tables[0].sorts.number
            found.append((
                share * float(np.minimum.reduce([t.forward_s for t in tables]) @ number),
                share * float(np.minimum.reduce([t.backward_s for t in tables]) @ number),
            ))
        return found[0], found[1]


def shared_work(c: Candidate, forward_s: float, backward_s: float) -> float:
    """What a step takes at least, where a micro-batch takes so long through all blocks and stages share that evenly."""
    m, most = c.num_micro_batches, min(c.pp, c.num_micro_batches)
    later = ((m - 1) * backward_s + (m - most) * forward_s) / c.pp
    return max(forward_s + backward_s + later, m * (forward_s + backward_s) / c.pp)


def _is_measured(kind: StageKind) -> bool:
    """Whether times of this kind of stage come from measurements, which need not grow evenly with the rows."""
    groups = [group for group in (kind.tp_group, *(axis.group for axis in kind.context)) if group is not None]
    return op_table(kind.device) is not None or any(group.link.fits or group.network.fits for group in groups)
