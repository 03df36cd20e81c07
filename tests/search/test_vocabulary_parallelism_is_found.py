"""On real heads the search splits the vocabulary: no rank ever holds the logits of all words."""

import pytest
from real_blocks import captured, found

from autopar.sharding.lowering import Lowering
from autopar.sharding.reshard import Collective
from autopar.sharding.state import RP, P, R, shard


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("model", ["llama-8b", "qwen2-7b", "gpt2-7b"])
def test_the_loss_works_on_a_part_of_the_vocabulary(model: str, sequence_parallel: bool) -> None:
    graph = captured(model, 4096)
    head = found(graph, "8xH100-80GB", 8, sequence_parallel=sequence_parallel, rows=4, block=-1)
    assert head.params("lm_head", "wte") == {"wte" if model.startswith("gpt2") else "lm_head": "S(0)"}
    (loss,) = head.strategies("cross_entropy")
    assert loss.lowering == Lowering.VOCAB_PARALLEL_CROSS_ENTROPY
    assert loss.inputs[0] == shard(1)
    vocabulary = {info.shape[0] for info in head.cls.tensors if info.name in head.cls.params and len(info.shape) == 2}
    assert len(vocabulary) == 1
    assert not [move for move in head.moves if move.shape[-1] in vocabulary]
    (move,) = head.moves  # of the normed hidden states alone
    expected = (Collective.ALL_GATHER, Collective.REDUCE_SCATTER) if sequence_parallel else (None, "all_reduce")
    assert (move.forward, move.backward) == expected
    assert move.dst == RP


def test_with_whole_weights_the_rows_of_the_logits_are_split() -> None:
    head = found(
        captured("llama-8b", 4096), "8xH100-80GB", 8, sequence_parallel=True, block=-1, split_weights=False
    )
    (loss,) = head.strategies("cross_entropy")
    assert loss.lowering == Lowering.SUM_OVER_COUNT
    assert [(move.src, move.dst, move.shape) for move in head.moves] == [(P, R, ())], "the loss itself, no logits"


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_tied_embedding_splits_its_vocabulary_as_its_head_does(sequence_parallel: bool) -> None:
    """Alone, an embedding splits its width; one that is also the head would then be whole on every rank."""
    graph = captured("llama-8b", 4096, ("tie_word_embeddings", True))
    first, last = (
        found(graph, "8xH100-80GB", 8, sequence_parallel=sequence_parallel, rows=4, block=block) for block in (0, -1)
    )
    (lookup,) = first.strategies("embedding")
    assert lookup.lowering == Lowering.VOCAB_PARALLEL_EMBEDDING
    assert (lookup.inputs[0], lookup.outputs[0]) == (shard(0), P)
    assert first.forward == ({"reduce_scatter": 1} if sequence_parallel else {"all_reduce": 1})
    assert set(first.params().values()) == {"S(0)"}
    (loss,) = last.strategies("cross_entropy")
    assert loss.lowering == Lowering.VOCAB_PARALLEL_CROSS_ENTROPY
    untied = found(captured("llama-8b", 4096), "8xH100-80GB", 8, sequence_parallel=sequence_parallel, rows=4, block=0)
    assert set(untied.params().values()) == {"S(1)"}


def test_a_tied_embedding_stays_whole_where_that_is_free() -> None:
    graph = captured("llama-8b", 4096, ("tie_word_embeddings", True))
    first = found(graph, "8xH100-80GB", 8, sequence_parallel=False, rows=4, block=0, split_weights=False)
    assert first.strategies("embedding")[0].lowering == ""
