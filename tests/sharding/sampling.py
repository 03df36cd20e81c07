"""Random calls of ops: sizes of which some divide by 2, some by 3, some by neither, and a table of makers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shard_compare import Sample

T = torch.Tensor
_SIZES = (1, 2, 3, 4, 6, 6, 12)


class Pick:
    """Random sizes and tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)

    def size(self) -> int:
        return self.rng.choice(_SIZES)

    def shape(self, rank: int) -> tuple[int, ...]:
        return tuple(self.size() for _ in range(rank))

    def x(self, *shape: int) -> T:
        return torch.randn(*shape, dtype=torch.float64)

    def positive(self, *shape: int) -> T:
        return torch.rand(*shape, dtype=torch.float64) + 0.1

    def ids(self, high: int, *shape: int) -> T:
        return torch.randint(0, high, shape)

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def one_of(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to `shape`."""
        kept = tuple(1 if self.rng.random() < 0.4 else size for size in shape)
        return kept[self.rng.randrange(len(shape)) if self.flag() else 0 :]


Maker = Callable[[Pick], Sample]
SAMPLES: list[tuple[str, Maker, int]] = []  # target, maker, how many draws


def sample(*targets: str, draws: int = 5) -> Callable[[Callable[[Pick, str], Sample]], Callable[[Pick, str], Sample]]:
    def register(make: Callable[[Pick, str], Sample]) -> Callable[[Pick, str], Sample]:
        for target in targets:
            name = f"aten.{target}"
            SAMPLES.append((name, lambda pick, name=name: make(pick, name), draws))
        return make

    return register


def draws(maker: Maker, number: int) -> Iterator[Sample]:
    """The op's first samples, the same in every run."""
    for seed in range(number):
        yield maker(Pick(seed))
