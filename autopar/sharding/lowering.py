"""Names and meanings of the special programs that some splits need, beyond the op itself on local shapes."""

from __future__ import annotations

from enum import StrEnum


class Lowering(StrEnum):
    """What an op does where its split is more than the same op on shards. n is the axis size, i the rank's index on it.

    AXIS_RANDOM: the op on shards, with a random stream of its own on each rank of the axis.
    SCALED_MEAN: the op on shards, its output divided by n; the output is partial.
    BIAS_ON_FIRST_RANK: the op on shards with its bias (`local_args.bias_operand`) multiplied by 1 on rank 0 and by 0 on
        the others; the output is partial and so is the bias's gradient.
    VOCAB_PARALLEL_EMBEDDING: the weight holds rows [i*c, (i+1)*c), c = ceil(v/n), rows from v on being padding: ids
        outside give rows of zeros; output partial.
    SUM_OVER_COUNT: cross entropy with reduction "sum" over the local rows, divided by the number of valid targets
        (target != ignore_index) summed over the axis; the output is partial.
    VOCAB_PARALLEL_CROSS_ENTROPY: the logits hold classes [i*c, (i+1)*c), c = ceil(v/n), those from v on being
        padding that never wins: maximum, sum of exponentials and the
        target's logit are reduced over the axis; the output is whole and the logits' gradient is
        (softmax - one_hot) of the local classes, with no communication.
    CAUSAL_CONTEXT: causal attention of queries [i*q/n, (i+1)*q/n) to the keys before (i+1)*q/n, the mask aligned to the
        lower right. Ranks i and n-1-i exchange the second halves of their queries, so that all attend to equally many
        keys; dropout draws from a random stream of the rank's own.
    RING_ATTENTION: attention of queries, keys and values [i*q/n, (i+1)*q/n): keys and values go from rank to rank, and
        the parts of a row's softmax are merged. Under a causal mask ranks i and n-1-i first exchange the second halves
        of their parts. No dropout, no other mask.
    VOCAB_PARALLEL_EMBEDDING_BAG: the weight holds rows [i*v/n, (i+1)*v/n): ids outside add zeros to the sum of their
        bag; output partial.
    SPATIAL_HALO: the op on a part of the positions of its first operand, lengthened by the positions that it needs of
        the parts before and after (`rules.windows.halo_of`); their gradient goes back and is added.
    SYNC_BATCH_NORM: a batch norm in training on a part of the batch or of the positions, with the statistics of the
        whole; the running statistics are whole on every rank.
    CHANNEL_STATISTICS: a batch norm in training on channels [i*c/n, (i+1)*c/n), with running statistics that are whole
        on every rank: each updates its part, and the parts are gathered.
    OWN_EXPERTS: the weights hold experts [i*e/n, (i+1)*e/n): choices of others are left out; the output is partial.
    EXPERT_EXCHANGE: tokens and experts are split. Each token goes to the ranks of its experts by an all-to-all of parts
        of unequal sizes, and the experts' results come back by a second; the output is this rank's tokens, whole.
    """

    AXIS_RANDOM = "axis_random"
    SCALED_MEAN = "scaled_mean"
    BIAS_ON_FIRST_RANK = "bias_on_first_rank"
    VOCAB_PARALLEL_EMBEDDING = "vocab_parallel_embedding"
    SUM_OVER_COUNT = "sum_over_count"
    VOCAB_PARALLEL_CROSS_ENTROPY = "vocab_parallel_cross_entropy"
    CAUSAL_CONTEXT = "causal_context"
    RING_ATTENTION = "ring_attention"
    VOCAB_PARALLEL_EMBEDDING_BAG = "vocab_parallel_embedding_bag"
    SPATIAL_HALO = "spatial_halo"
    SYNC_BATCH_NORM = "sync_batch_norm"
    CHANNEL_STATISTICS = "channel_statistics"
    OWN_EXPERTS = "own_experts"
    EXPERT_EXCHANGE = "expert_exchange"
