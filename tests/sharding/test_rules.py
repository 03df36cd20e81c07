"""Every rule is proved: each strategy of each sample, run on shards, equals the whole op, forward and backward."""

from __future__ import annotations

import pytest
import torch
from op_samples import SAMPLES, Maker, draws
from shard_compare import build, check, sample_strategies


@pytest.mark.parametrize(("target", "maker"), SAMPLES, ids=[f"{i}-{target}" for i, (target, _) in enumerate(SAMPLES)])
@pytest.mark.filterwarnings("ignore")
def test_shards_put_together_equal_the_whole(target: str, maker: Maker) -> None:
    for drawn in draws(maker, 12):
        built = build(drawn)
        for size in (2, 3):
            for strategy in sample_strategies(built, size):
                torch.manual_seed(size)
                check(built, strategy, size)
