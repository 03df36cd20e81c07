"""The oracle of execution: a longest path, found by relaxation until nothing changes."""

from __future__ import annotations

from autopar.plan.actions import Action, ActionLists, requirements
from autopar.simulate.events import StageTimes


def brute_force_end_s(lists: ActionLists, stages: list[StageTimes]) -> float:
    """The end of the last action under rank order, data arrival, and one message a link at a time."""
    order: dict[Action, float] = {action: 0.0 for actions in lists for action in actions}

    def span(action: Action) -> float:
        times = stages[action.stage]
        return {"F": times.forward_s, "B": times.backward_s, "I": times.input_backward_s, "W": times.weight_backward_s}[
            action.kind
        ]

    changed = True
    while changed:
        changed = False
        arrival: dict[tuple[Action, int], float] = {}
        for actions in lists:
            for stage in {a.stage for a in actions}:
                free = [0.0, 0.0]
                for action in actions:
                    if action.stage != stage or action.kind == "W":
                        continue
                    way = 0 if action.kind == "F" else 1
                    send = stages[stage].send_backward_s if way else stages[stage].send_forward_s
                    free[way] = max(free[way], order[action] + span(action)) + send
                    arrival[action, stage + (1 - 2 * way)] = free[way]
        for actions in lists:
            last = 0.0
            for action in actions:
                start = last
                for options in requirements(action, len(stages)):
                    for option in options:
                        if option in order:
                            own = option.stage == action.stage
                            start = max(start, order[option] + span(option) if own else arrival[option, action.stage])
                if start > order[action] + 1e-12:
                    order[action] = start
                    changed = True
                last = order[action] + span(action)
    return max(start + span(action) for action, start in order.items())
