"""Best-first branch and bound over candidates: the one with the smallest bound is refined, and simulated last."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import chain, combinations, pairwise

from autopar.cluster.cluster import Cluster
from autopar.cluster.fingerprint import cluster_fingerprint
from autopar.errors import InputError
from autopar.graph.fingerprint import model_fingerprint
from autopar.graph.model_graph import ModelGraph
from autopar.plan.plan import Plan, Recompute, Schedule, Stage
from autopar.search.bounds import Bounds, Cuts
from autopar.search.candidates import Candidate, PlanRequest
from autopar.search.degrees import even_cuts, stage_devices
from autopar.search.shardings import ShardingChooser
from autopar.search.single_room import fitting, single_room
from autopar.search.stage_kinds import StageKind, StageLayout
from autopar.search.variants import Option, Room, cheapest, layer_options
from autopar.sharding.rewrites import rewritten
from autopar.simulate.simulator import simulate
from autopar.simulate.stage_cost import expert_axis, is_layer, stage_cost

Progress = Callable[[int, int, float | None], None]  # candidates settled, of how many, best step time so far
# A limit in work, not in time, so that the same input gives the same plan on every machine.
MAX_SIMULATED_ACTIONS = 1_500_000
MAX_SIMULATIONS = 400
MAX_EVERY_CUT = 64  # cuts of a candidate that are all tried where the bounds leave a gap
NUM_BEHIND = 6  # pipelines next to the best that are looked at closely


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Found:
    """A candidate with a cut, simulated and found to fit. The order breaks ties by settings."""

    step_time_s: float
    candidate: Candidate
    cuts: Cuts
    peak_bytes: tuple[float, ...] = field(compare=False)  # of each stage
    limit_bytes: tuple[float, ...] = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The best found (None: nothing fits) and what no candidate can beat. `complete`: all candidates are settled.

    `timed_out`: the time limit or an interrupt came first.
    """

    best: Found | None
    lower_bound_s: float
    num_simulated: int
    complete: bool
    timed_out: bool = False


class Level(IntEnum):
    """How a bound in the queue was found; each takes longer than the one before and says more."""

    ROUGH = 0
    QUICK = 1
    OF_CUTS = 2
    CLOSER = 3


@dataclass(slots=True, kw_only=True)
class _State:
    """How far a search is; whole enough at every moment that an interrupt leaves a true outcome."""

    best: Found | None
    below_s: float
    most: int  # simulations
    proves: bool
    most_refined: float = math.inf  # candidates of which the best cut is looked for
    # (bound, how it was found, candidate, the cuts to simulate); a candidate that cannot fit is not there.
    queue: list[tuple[float, Level, Candidate, tuple[Cuts, ...]]] = field(default_factory=list)
    lower: float = math.inf
    bound: float = 0.0  # of the candidate in hand
    open: list[tuple[float, Candidate]] = field(default_factory=list)  # with bounds of the cuts that were not tried
    simulations: int = 0
    refined: int = 0
    actions: int = 0  # of those
    timed_out: bool = False
    stopped: bool = False


def new_chooser(graph: ModelGraph, cluster: Cluster, request: PlanRequest) -> ShardingChooser:
    """What chooses the shardings of a request's candidates."""
    return ShardingChooser(
        graph, cluster, request.dtype, rows=request.micro_batch or 1, rewrites=True, compile=request.compile
    )


class Engine:
    """Bounds and simulates candidates of one request; a candidate with a cut is simulated once."""

    def __init__(
        self, graph: ModelGraph, cluster: Cluster, request: PlanRequest, *, chooser: ShardingChooser | None = None
    ) -> None:
        """`chooser`: what `new_chooser` made for this graph and request, and for as many or more of the same nodes."""
        self.graph, self.cluster, self.request = graph, cluster, request
        self.chooser = chooser or new_chooser(graph, cluster, request)
        self.layout = StageLayout(cluster, request.dtype)
        self.bounds = Bounds(graph, self.layout, request, self.chooser)
        self._model, self._machine = model_fingerprint(graph), cluster_fingerprint(cluster)
        self.best: Found | None = None  # of all that was simulated
        self.interrupted = False  # by the user, with a plan already found: every search from then on ends at once
        self._simulated: dict[tuple[Candidate, Cuts], Found | None] = {}
        self._cut_s: dict[tuple[Candidate, Cuts], float] = {}  # bounds of cuts
        self._quick: dict[Candidate, float] = {}
        self._even: dict[int, Cuts | None] = {}
        self._searched: list[Sequence[Candidate]] = []
        self._closer: dict[Candidate, tuple[float, Cuts]] = {}  # of pipelines, the closer bound of their best cut

    def search(
        self, candidates: Sequence[Candidate], *, even: bool = False, incumbent: Found | None = None,
        deadline: float | None = None, progress: Progress | None = None, below_s: float = math.inf,
        max_simulations: int | None = None, max_refined: float = math.inf, proves: bool = True,
    ) -> Outcome:
        """The best of the candidates over all cuts, or over even ones alone; never worse than the incumbent.

        What takes `below_s` or more is not looked for. Not `proves`: what no simulation is left for is not bounded, and
        of at most `max_refined` candidates the best cut is looked for.

        An interrupt ends it as the time limit does where a plan was found before; else the caller gets the interrupt.
        """
        state = _State(best=incumbent, below_s=below_s, most=max_simulations or MAX_SIMULATIONS, proves=proves,
                       most_refined=max_refined)
        filled = False
        if not even:
            self._searched.append(candidates)
        try:
            self._fill(state, candidates)
            filled = True
            self._settle(state, even, deadline, progress)
            self._try_every_cut(state, deadline)
        except KeyboardInterrupt:
            if self.best is None:
                raise
            self.interrupted = state.timed_out = state.stopped = True
            if filled:
                state.lower = min(state.lower, state.bound)  # of the candidate in hand
            else:
                self._fill(state, candidates)
        best = state.best
        lower = min((state.lower, *(entry[0] for entry in state.queue), *(bound for bound, _ in state.open)))
        if best is not None:
            lower = min(lower, best.step_time_s)
        if progress is not None:
            progress(len(candidates), len(candidates), best.step_time_s if best else None)
        return Outcome(
            best=best, lower_bound_s=lower, num_simulated=state.simulations, complete=not state.stopped,
            timed_out=state.timed_out,
        )

    def _fill(self, state: _State, candidates: Sequence[Candidate]) -> None:
        """Bounds all candidates roughly, which is quick: a time limit or an interrupt then leaves a true bound."""
        rough = self.bounds.work.rough
        state.queue = [(rough(candidate), Level.ROUGH, candidate, ()) for candidate in self._stand_ins(candidates)]
        heapq.heapify(state.queue)

    def _stand_ins(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        """The candidates; of those that differ in where the optimizer's state is, one that neither can be below.

        It holds what the one does that offloads the state, which is less, and takes what the other does. Only pipelines
        of stages that are alike, whose bounds take longest.
        """
        every = set(candidates)
        for c in candidates:
            other = replace(c, offload_optimizer=not c.offload_optimizer)
            if other not in every or not self._alike(c):
                yield c
            elif c.offload_optimizer:
                yield replace(c, free_offload=True)

    def _alike(self, c: Candidate) -> bool:
        """Whether it is a pipeline of stages that are alike."""
        return c.pp > 1 and len(set(self.layout.kinds(c))) == 1

    def _settle(self, state: _State, even: bool, deadline: float | None, progress: Progress | None) -> None:
        """Refines and simulates what may beat the best, the smallest bound first.

        Where the limit of work ends it, what is left is still bounded as well as it can be without simulating it.
        """
        queue, total = state.queue, len(state.queue)
        while queue:
            bound, level, candidate, cuts = queue[0]
            best = state.best
            if bound >= state.below_s or (best is not None and bound >= best.step_time_s):
                break
            timed_out = self.out_of_time(deadline)
            stopped = timed_out or state.simulations >= state.most or state.actions >= MAX_SIMULATED_ACTIONS
            if stopped and (best is not None or timed_out or math.isfinite(state.below_s)):
                state.stopped = True
                state.timed_out = state.timed_out or timed_out
                if timed_out or level is Level.CLOSER or not state.proves:
                    break
            state.bound = bound
            heapq.heappop(queue)
            settled = max(0, total - len(queue))  # a stand-in makes two
            if progress is not None and settled % 50 == 0:
                progress(settled, total, best.step_time_s if best else None)
            if level is Level.ROUGH:
                closer = self._quick_bound(candidate, min(state.below_s, best.step_time_s if best else math.inf))
                if closer < math.inf:
                    heapq.heappush(queue, (max(bound, closer), Level.QUICK, candidate, ()))
                continue
            if level is Level.QUICK and state.refined >= state.most_refined:
                state.stopped = True
                continue
            if level is Level.QUICK:
                state.refined += 1
                entry = self._refine(candidate, even, min(state.below_s, best.step_time_s if best else math.inf))
                if entry is not None:
                    heapq.heappush(queue, (max(bound, entry[0]), Level.OF_CUTS, candidate, entry[1]))
                continue
            if level is Level.OF_CUTS:
                limit_s = min(state.below_s, best.step_time_s if best else math.inf)
                if even:
                    closer, of_cuts = self.bounds.closer_of_cut(candidate, cuts[0]), dict[Cuts, float]()
                else:
                    closer, of_cuts = self.bounds.closer(candidate, bound, cuts, limit_s)
                least, at = min(((own, cut) for cut, own in of_cuts.items()), default=(math.inf, ()))
                if candidate.pp > 1 and least < math.inf:
                    self._closer[candidate] = least, at
                if closer == math.inf:
                    continue
                closer = max(bound, closer)
                if candidate.free_offload:
                    self._closer.pop(candidate, None)  # those that it stands for have their own
                    for own in (False, True):
                        each = replace(candidate, offload_optimizer=own, free_offload=False)
                        heapq.heappush(queue, (closer, Level.QUICK, each, ()))
                    continue
                if not even:
                    self._cut_s |= {(candidate, cut): own for cut, own in of_cuts.items()}
                    fit = [cut for cut, own in of_cuts.items() if own < math.inf]
                    cuts = tuple(sorted(fit, key=lambda cut: (of_cuts[cut], cut)))
                heapq.heappush(queue, (closer, Level.CLOSER, candidate, cuts))
                continue
            for cut in cuts:
                self._try(state, candidate, cut)
            if not even and candidate.pp > 1 and len(self.graph.blocks) > candidate.pp:
                state.open.append((bound, candidate))  # its other cuts

    def _try_every_cut(self, state: _State, deadline: float | None) -> None:
        """Settles the candidates that have few cuts and whose bounds are below the best, the smallest bound first."""
        left = state.open = sorted(state.open)
        while left and not state.stopped and state.best is not None:
            bound, candidate = left[0]
            inner = len(self.graph.blocks) - 1  # borders between blocks
            if bound >= min(state.below_s, state.best.step_time_s) or self.out_of_time(deadline):
                return
            if math.comb(inner, candidate.pp - 1) > MAX_EVERY_CUT:
                state.lower = min(state.lower, left.pop(0)[0])
                continue
            state.bound = bound
            for borders in combinations(range(1, inner + 1), candidate.pp - 1):
                cut = (0, *borders, inner + 1)
                if (candidate, cut) not in self._cut_s:
                    self._cut_s[candidate, cut] = self.bounds.closer_of_cut(candidate, cut)
                self._try(state, candidate, cut)
                if state.simulations >= state.most or state.actions >= MAX_SIMULATED_ACTIONS:
                    return
            left.pop(0)

    def _try(self, state: _State, candidate: Candidate, cut: Cuts) -> None:
        """Simulates a cut, unless its bound is not below the best."""
        if state.best is not None and self._cut_s.get((candidate, cut), 0.0) >= state.best.step_time_s:
            return
        if (candidate, cut) not in self._simulated:
            state.simulations += 1
            state.actions += 2 * candidate.pp * candidate.num_micro_batches
        found = self.simulate(candidate, cut)
        if found is not None and (state.best is None or found < state.best):
            state.best = found

    def out_of_time(self, deadline: float | None) -> bool:
        """Whether the user's interrupt or the time limit has come."""
        return self.interrupted or (deadline is not None and time.monotonic() > deadline)

    def probe(self, candidates: Sequence[Candidate], deadline: float) -> None:
        """Simulates candidates that need little memory, evenly cut, until one fits, for half the time at most."""
        until = time.monotonic() + (deadline - time.monotonic()) / 2
        for candidate in lean_first(candidates):
            cuts = self.even_cuts(candidate.pp)
            if cuts is not None and self.simulate(candidate, cuts) is not None:
                return
            if self.out_of_time(until):
                return

    def _quick_bound(self, candidate: Candidate, limit_s: float) -> float:
        if candidate in self._quick:
            return self._quick[candidate]
        found = self.bounds.quick(candidate, limit_s)
        if found < limit_s or math.isinf(found):
            self._quick[candidate] = found
        return found

    def _refine(self, candidate: Candidate, even: bool, limit_s: float) -> tuple[float, tuple[Cuts, ...]] | None:
        """A better bound, and the cuts to simulate; None where no cut fits, or none that is below the limit."""
        regular = self.even_cuts(candidate.pp)
        if even:
            if regular is None or math.isinf(bound := self.bounds.of_cut(candidate, regular)):
                return None
            return bound, (regular,)
        found = self.bounds.best_cut(candidate, limit_s)
        if found is None:
            return None
        bound, cuts = found
        if regular is None or regular == cuts:
            return bound, (cuts,)
        if not self._alike(candidate) and math.isinf(self.bounds.of_cut(candidate, regular)):  # else `closer` tells
            return bound, (cuts,)
        return bound, (cuts, regular)

    def even_cuts(self, num_stages: int) -> Cuts | None:
        """Equally many layers a stage; None where there are fewer layers than stages."""
        if num_stages not in self._even:
            try:
                self._even[num_stages] = even_cuts(self.graph, num_stages) if num_stages > 1 else (
                    0, len(self.graph.blocks))
            except InputError:
                self._even[num_stages] = None
        return self._even[num_stages]

    def simulate(self, candidate: Candidate, cuts: Cuts) -> Found | None:
        """The candidate under this cut as the simulator sees it; None where it does not fit."""
        key = (candidate, cuts)
        if key not in self._simulated:
            timeline = simulate(self.graph, self.cluster, self.plan(candidate, cuts), detail=False)
            limits = tuple(kind.memory_limit_bytes for kind in self.layout.kinds(candidate))
            self._simulated[key] = Found(
                step_time_s=timeline.step_time_s, candidate=candidate, cuts=cuts, limit_bytes=limits,
                peak_bytes=timeline.rank_peak_bytes,
            ) if timeline.feasible else None
        found = self._simulated[key]
        if found is not None and (self.best is None or found < self.best):
            self.best = found
        return found

    def searched_pipelines(self) -> Iterator[Candidate]:
        """Every candidate of several stages that was searched over all cuts."""
        return (c for c in dict.fromkeys(chain.from_iterable(self._searched)) if c.pp > 1)

    def simulate_behind(self, count: int, limit_s: float) -> None:
        """Simulates so many of the pipelines that were not, those of least closer bounds, below the limit."""
        every = sorted((own, c, cut) for c, (own, cut) in self._closer.items() if own < limit_s)
        least = [(own, c, cut) for own, c, cut in every if (c, cut) not in self._simulated][:NUM_BEHIND]
        found = [(own, c, cut) for own, c, cut in least if not c.free_offload]
        for _, c, cut in least:
            for offload in (False, True) if c.free_offload else ():
                own = replace(c, offload_optimizer=offload, free_offload=False)
                found.append((self.bounds.closer_of_cut(own, cut), own, cut))
        for bound, c, cut in sorted(found)[:count]:
            if bound < limit_s and not self.interrupted:
                self.simulate(c, cut)

    def quickest_pipelines(self, count: int, *, but: Container[Found] = ()) -> list[Found]:
        """Of all that was simulated and fits the pipelines of least time, each candidate's best cut; but not those."""
        best: dict[Candidate, Found] = {}
        every = (own for own in self._simulated.values() if own is not None and own.candidate.pp > 1)
        for found in sorted(own for own in every if own not in but):
            best.setdefault(found.candidate, found)
        return list(best.values())[:count]

    def plan(self, c: Candidate, cuts: Cuts, *, ep: int = 1, deeper: int = 0) -> Plan:
        """The candidate as a plan, with no certificate yet; layers recompute or offload so that every stage fits.

        Where nothing makes a stage fit, its layers keep everything. `ep`: the size of an expert axis; `deeper`: how
        many more micro-batches are to fit than 1F1B has in flight.
        """
        plan = self.plan_of(c, cuts, ep=ep)
        stages = tuple(
            stage if options is None else stage.with_variants([option.variant for option in options])
            for index, stage in enumerate(plan.stages)
            for options in [self.options(c, self.layout.kinds(c)[index], plan, index, deeper=deeper)]
        )
        return replace(plan, stages=stages)

    def options(
        self, c: Candidate, kind: StageKind, plan: Plan, index: int, *, deeper: int = 0
    ) -> tuple[Option, ...] | None:
        """What the layers of a stage do so that it fits, of least added time, with so many more in flight than in 1F1B.

        None where they can keep everything, and where nothing makes it fit.
        """
        stage = plan.stages[index]
        graph = rewritten(self.graph, plan.rewrites)
        cost = stage_cost(graph, self.cluster, plan, index)
        left = kind.memory_limit_bytes - cost.static.total
        in_flight = min(plan.num_stages - index + deeper, c.num_micro_batches)
        if cost.peak_bytes(in_flight) <= kind.memory_limit_bytes:
            return None
        blocks = self.graph.blocks[stage.first : stage.last]
        found = self.bounds.block_costs(c, kind, expert_axis(self.cluster, stage))
        layers = [found[block.cls] for block in blocks if is_layer(block)]
        others = [found[block.cls] for block in blocks if not is_layer(block)]
        entry = max((layer.boundary_bytes for layer in layers), default=0.0) if index else 0.0
        host = (kind.device.host_memory_bytes or math.inf) - cost.host_state_bytes
        number = sum(map(is_layer, self.graph.blocks))
        alike = {id(layer): layer for layer in layers}
        of_layer = {
            key: layer_options(layer, kind.device, number, offload=self.request.offload) for key, layer in alike.items()
        }
        options = [of_layer[id(layer)] for layer in layers]
        m = c.num_micro_batches
        if cost.single is not None:
            own = [is_layer(block) for block in blocks]
            single = single_room(
                cost.single, own, limit_bytes=kind.memory_limit_bytes, step_bytes=cost.optimizer_step_bytes,
                entry_bytes=entry, host_bytes=host,
            )
            if single is None:
                return None

            def peak(found: tuple[Option, ...]) -> float:
                with_ = stage.with_variants([option.variant for option in found])
                others = (*plan.stages[:index], with_, *plan.stages[index + 1 :])
                return stage_cost(graph, self.cluster, replace(plan, stages=others), index).peak_bytes(1)

            return fitting(options, single, (1.0, 1.0), peak, kind.memory_limit_bytes)
        if cost.optimizer_step_bytes > left:
            return None
        beside = max((other.transient_bytes for other in others), default=0.0)
        # One micro-batch is still there when gradients are reduced: what of the room it may fill, as if all could.
        beside = max(beside, left - in_flight * (left - cost.reduction_bytes))
        room = Room(
            budget_bytes=left - in_flight * sum(other.saved_bytes for other in others), in_flight=in_flight,
            extra_bytes=beside, entry_bytes=entry, host_bytes=host,
        )
        return cheapest(options, room, (float(m - in_flight + 1), float(m)))

    def plan_of(self, c: Candidate, cuts: Cuts, *, ep: int = 1) -> Plan:
        """The candidate as a plan whose layers keep everything."""
        choice = self.chooser.choose(
            c.tp, sequence_parallel=c.sequence_parallel, split_weights=c.split_weights, cp=c.cp
        )
        assert choice is not None, "candidates have shardings"
        request = self.request
        return Plan(
            model_name=self.graph.name, model_fingerprint=self._model, cluster_name=self.cluster.name,
            cluster_fingerprint=self._machine, num_devices=self.cluster.num_devices,
            global_batch=request.global_batch, seq_len=request.seq_len, dtype=request.dtype,
            param_dtype=request.param_dtype, optimizer=request.optimizer, micro_batch=c.micro_batch,
            num_micro_batches=c.num_micro_batches, schedule=Schedule.ONE_F_ONE_B,
            sequence_parallel=c.sequence_parallel, compile=request.compile,
            shardings=self.chooser.shardings(
                c.tp, c.micro_batch, sequence_parallel=c.sequence_parallel, split_weights=c.split_weights, cp=c.cp
            ),
            rewrites=choice.rewrites, notes=choice.notes, blocks=tuple(block.name for block in self.graph.blocks),
            stages=tuple(
                Stage(
                    first=first, last=last, devices=stage_devices(stage, c.mesh.size), mesh=replace(c.mesh, ep=ep),
                    zero=c.zero, recompute=Recompute.NONE, offload_optimizer=c.offload_optimizer,
                )
                for stage, (first, last) in enumerate(pairwise(cuts))
            ),
        )


def lean_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """For each mesh the candidates with the fewest rows, and then those of one micro-batch.

    Those that most often need least memory come first. The ones with more rows may need less where their backward makes
    gradients as it frees activations.
    ZeRO mostly saves memory, but not always: a layer is not gathered where its parameters are whole.
    """
    fewest: dict[tuple[int, int], int] = {}
    for c in candidates:
        fewest[c.pp, c.tp] = min(c.micro_batch, fewest.get((c.pp, c.tp), c.micro_batch))
    more = {c: c.micro_batch != fewest[c.pp, c.tp] for c in candidates}
    lean = [c for c in candidates if not more[c] or c.num_micro_batches == 1]
    return sorted(lean, key=lambda c: (more[c], not c.offload_optimizer, -c.zero, -c.dp_shard, c.pp, -c.tp, c))
