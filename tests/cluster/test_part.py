"""Parts of a cluster: their nodes, and the text that names them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.parse import parse_cluster
from autopar.cluster.part import part_of, ranges, split_part
from autopar.errors import InputError

WHOLE = parse_cluster("2x4xH100-80GB+1x2xA100-80GB@200Gbps")


@given(st.sets(st.integers(0, WHOLE.num_devices - 1), min_size=1))
def test_a_part_is_read_back_from_its_name(ranks: set[int]) -> None:
    part = part_of(WHOLE, tuple(ranks))
    assert parse_cluster(part.name) == part
    assert [part.device(i) for i in range(part.num_devices)] == [WHOLE.device(rank) for rank in sorted(ranks)]
    together = [WHOLE.node_of[rank] for rank in sorted(ranks)]
    assert [part.node_of[i] == part.node_of[0] for i in range(len(ranks))] == [own == together[0] for own in together]


@given(st.sets(st.integers(0, 50), min_size=1))
def test_ranges_are_read_back(numbers: set[int]) -> None:
    assert split_part("lab.yaml#" + ranges(tuple(sorted(numbers)))) == ("lab.yaml", tuple(sorted(numbers)))


def test_a_part_of_a_part_counts_its_own_devices() -> None:
    assert parse_cluster("2x4xH100-80GB#4-7#0-1").nodes == parse_cluster("2x4xH100-80GB#4,5").nodes


@pytest.mark.parametrize(("text", "word"), [
    ("2x4xH100-80GB#8", "no device 8"), ("2x4xH100-80GB#", "numbers of its devices"),
    ("2x4xH100-80GB#3-1", "numbers of its devices"), ("2x4xH100-80GB#1,1", "twice"),
    ("2x4xH100-80GB#0-999999999", "million"), ("#0", "empty"),
])
def test_what_names_no_part_is_told(text: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        parse_cluster(text)
