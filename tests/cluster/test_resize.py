"""More or fewer of the same nodes, under a name that reads back as the same cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster.parse import parse_cluster
from autopar.cluster.resize import with_nodes
from autopar.errors import InputError

TEXTS = ("8xH100-80GB", "4xH100", "2x4xA100-80GB", "1x8xA100-80GB@800Gbps", "3 x 2 x T4 @ 25 Gb/s", "16xH100-80GB")


@given(st.sampled_from(TEXTS), st.integers(1, 20))
def test_shorthand_stays_shorthand(text: str, num_nodes: int) -> None:
    found = with_nodes(parse_cluster(text), num_nodes)
    assert len(found.nodes) == num_nodes
    assert parse_cluster(found.name).nodes == found.nodes


def test_other_names_say_what_is_repeated(tmp_path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("nodes: [{count: 2, devices: 4, device: A100-80GB}]\n")
    found = with_nodes(parse_cluster(str(path)), 5)
    assert (found.name, found.num_devices) == (f"5 nodes of {path}", 20)


@pytest.mark.parametrize(("text", "num_nodes", "word"), [
    ("1x8xA100-80GB+1x4xT4@100Gbps", 3, "unlike nodes"), ("8xH100-80GB", 0, "at least 1"),
    ("8xH100-80GB", 10**6, "devices"),
])
def test_what_cannot_be_repeated(text: str, num_nodes: int, word: str) -> None:
    with pytest.raises(InputError, match=word):
        with_nodes(parse_cluster(text), num_nodes)
