"""States: written and read, and keys in whatever process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from autopar.sharding.state import RP, P, R, State, padded_shard, shard

STATES = [R, RP, P, shard(0), shard(2), shard(1, 3), padded_shard(1, 97)]


@pytest.mark.parametrize("state", STATES, ids=str)
def test_a_state_is_the_one_that_its_text_and_its_copies_are(state: State) -> None:
    for other in (State.parse(str(state)), pickle.loads(pickle.dumps(state)), replace(state)):
        assert other == state
        assert hash(other) == hash(state)
        assert {state: 1}[other] == 1
    assert [other == state for other in STATES].count(True) == 1
    assert replace(state, outer=7) != state
    assert hash(replace(state, outer=7)) == hash(State(state.kind, state.dim, 7, state.length))


def test_a_state_from_another_process_is_found() -> None:
    script = "import pickle, sys; states = pickle.loads(sys.stdin.buffer.read());" \
        "from autopar.sharding.state import State;" \
        "print(sum(state in {State.parse(str(state))} for state in states))"
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(STATES), capture_output=True,
                              check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert int(done.stdout) == len(STATES)
