"""Joint strategies as rows of numbers are the tuples that they stand for."""

from itertools import product

import numpy as np

from autopar.sharding.joint import JointOptions
from autopar.sharding.state import RP, R, shard
from autopar.sharding.strategy import Strategy

EACH = tuple(Strategy(factor=name, inputs=(state,), outputs=(state,)) for name, state in (
    ("", R), ("", RP), ("b", shard(0))))
PAIRS = tuple(product(EACH, repeat=2))


def test_they_are_a_sequence_of_tuples() -> None:
    options = JointOptions.of(PAIRS, 2)
    assert tuple(options) == PAIRS
    assert (len(options), options[4], options[2:4]) == (9, PAIRS[4], PAIRS[2:4])
    assert JointOptions.of(options, 2) is options


def test_a_choice_is_contained_by_value() -> None:
    options = JointOptions.of(PAIRS[:5], 2)
    assert (EACH[1], EACH[0]) in options
    assert (EACH[2], EACH[0]) not in options
    assert (EACH[0],) not in options


def test_some_of_them() -> None:
    assert tuple(JointOptions.of(PAIRS, 2).only(np.array([8, 0]))) == (PAIRS[8], PAIRS[0])
