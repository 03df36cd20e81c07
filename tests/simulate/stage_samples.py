"""Random stages and schedules for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from autopar.plan.plan import Schedule
from autopar.simulate.events import StageTimes

seconds = st.integers(0, 8).map(float)
any_times = st.builds(
    StageTimes, forward_s=seconds, backward_s=seconds, input_backward_s=seconds, weight_backward_s=seconds,
    send_forward_s=seconds, send_backward_s=seconds,
)


@st.composite
def named_schedules(draw: st.DrawFn) -> tuple[Schedule, int, int, int]:
    """A schedule, and the ranks, micro-batches and chunks to run it with."""
    name = draw(st.sampled_from(list(Schedule)))
    p = draw(st.integers(1, 4))
    v = draw(st.integers(1, 2)) if name is Schedule.INTERLEAVED else 1
    m = draw(st.integers(p, p + 5)) if name is Schedule.INTERLEAVED else draw(st.integers(1, 6))
    return name, p, m, v
