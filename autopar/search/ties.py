"""One state for a parameter that blocks of several classes use: an embedding that is also the head, say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autopar.graph.model_graph import BlockClass, ModelGraph
from autopar.sharding.joint import JointStrategy, Placement
from autopar.sharding.state import RP, Kind
from autopar.sharding.strategy import ClassSharding

Options = Mapping[str, Sequence[JointStrategy]]  # the strategies of each op of a class
Choice = tuple[ClassSharding, ...]  # of a class, one an axis
Choices = dict[str, Choice]  # by the class's name


@dataclass(frozen=True, kw_only=True)
class TieSearch:
    """The search for the states of shared parameters on all axes, over what a class costs.

    `solve` gives the best sharding of a class from some of its ops' strategies, `time_s` a block's time under a
    sharding, and `charge_s` what a step is charged for storing a class's parameter in a state.
    """

    graph: ModelGraph
    solve: Callable[[BlockClass, Options], Choice | None]
    time_s: Callable[[BlockClass, Choice], float]
    charge_s: Callable[[BlockClass, str, Placement], float]

    def settle(self, found: Choices, options: Mapping[str, Options]) -> Choices:
        """The shardings with each shared parameter in one state wherever that is faster.

        Where classes want a parameter in different states, every rank holds it whole. That is weighed against each
        state which they all can use. Several parameters are settled one after another, in the order of the chain.
        """
        settled, left = dict(found), dict(options)
        for users in self._shared().values():
            wanted = {_param_state(self.graph.block_class[name], settled[name], own) for name, own in users.items()}
            whole = (RP,) * len(next(iter(wanted)))
            best_s = self._total_s(users, settled, wanted.pop() if len(wanted) == 1 else whole)
            kept: dict[str, Options] = {}
            for state in self._common_states(users, left):
                fewer = {name: _storing(self.graph.block_class[name], left[name], own, state)
                         for name, own in users.items()}
                choices = self._solved(fewer)
                if choices is None:
                    continue
                total_s = self._total_s(users, choices, state)
                if total_s < best_s:
                    best_s, kept = total_s, fewer
                    settled.update(choices)
            left.update(kept)
        return settled

    def _shared(self) -> dict[str, dict[str, str]]:
        """For each parameter that several classes use: each such class's own name for it."""
        users: dict[str, dict[str, str]] = {}
        for block in self.graph.blocks:
            for name, own in zip(block.params, self.graph.block_class[block.cls].params, strict=True):
                users.setdefault(name, {})[block.cls] = own
        return {name: own for name, own in users.items() if len(own) > 1}

    def _common_states(self, users: Mapping[str, str], options: Mapping[str, Options]) -> list[Placement]:
        """The sharded states that some strategy of every consumer of the parameter takes it in."""
        common: set[Placement] | None = None
        for name, own in users.items():
            for op in self.graph.block_class[name].ops:
                for place, operand in enumerate(op.operands):
                    if operand == own:
                        states = {_taken(strategy, place) for strategy in options[name][op.name]}
                        common = states if common is None else common & states
        return sorted((s for s in common or () if any(own.kind is Kind.SHARDED for own in s)), key=str)

    def _solved(self, options: Mapping[str, Options]) -> Choices | None:
        found: Choices = {}
        for name, fewer in options.items():
            choice = self.solve(self.graph.block_class[name], fewer)
            if choice is None:
                return None
            found[name] = choice
        return found

    def _total_s(self, users: Mapping[str, str], choices: Mapping[str, Choice], state: Placement) -> float:
        """The time of all blocks that use the parameter and the charge for storing theirs, the shared one's once."""
        num_blocks = Counter(block.cls for block in self.graph.blocks)
        total = 0.0
        for name, own in users.items():
            cls, choice = self.graph.block_class[name], choices[name]
            others = [(param, _param_state(cls, choice, param)) for param in cls.params if param != own]
            each = self.time_s(cls, choice) + sum(self.charge_s(cls, param, s) for param, s in others)
            total += num_blocks[name] * each
        return total + self.charge_s(cls, own, state)


def _param_state(cls: BlockClass, choice: Choice, param: str) -> Placement:
    return tuple(own.params[cls.params.index(param)] for own in choice)


def _taken(strategy: JointStrategy, place: int) -> Placement:
    return tuple(own.inputs[place] for own in strategy)


def _storing(cls: BlockClass, options: Options, param: str, state: Placement) -> Options:
    """The strategies, less those that take the parameter in another state."""
    kept = dict(options)
    for op in cls.ops:
        places = [place for place, operand in enumerate(op.operands) if operand == param]
        if places:
            kept[op.name] = [s for s in kept[op.name] if all(_taken(s, place) == state for place in places)]
    return kept
