"""Plain networks, written here or of common shape, that are no transformers, tiny."""

from __future__ import annotations

from typing import Any

import torch
from entry import ROWS, VOCABULARY, Built, Entry, token_ids
from torch import Tensor, nn
from torch.nn import functional as F

_SIDE, _CLASSES = 16, 6


def _numbers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _classes(*shape: int, high: int = _CLASSES) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(5))


def _class_loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch["labels"])


class _Residual(nn.Module):
    """Two convolutions with batch norms around which the input passes, as in ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.way = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.way(x))


class ConvClassifier(nn.Module):
    """Images to classes: a stem with pooling, residual blocks that halve the image, a mean over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, 1, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(_Residual(8, 8, 1), _Residual(8, 12, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, _CLASSES)

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.blocks(self.stem(image))).flatten(1))
        return out


def conv_classifier() -> Built:
    return ConvClassifier(), {"image": _numbers(ROWS, 3, _SIDE, _SIDE), "labels": _classes(ROWS)}, _class_loss


class UNet(nn.Module):
    """Images to a class of each position: down, up by transposed convolution and by interpolation, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self._pair(3, 6)
        self.second = self._pair(6, 12)
        self.bottom = self._pair(12, 12)
        self.up = nn.ConvTranspose2d(12, 12, 2, 2)
        self.third = self._pair(24, 8)
        self.wide = nn.Upsample(scale_factor=2, mode="bilinear")
        self.fourth = self._pair(14, 6)
        self.head = nn.Conv2d(6, _CLASSES, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding="same"), nn.GroupNorm(2, outputs), nn.ReLU(),
        )

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        first = self.first(image)
        second = self.second(F.max_pool2d(first, 2))
        bottom = self.bottom(F.avg_pool2d(second, 2))
        third = self.third(torch.cat((self.up(bottom), second), 1))
        out: Tensor = self.head(self.fourth(torch.cat((self.wide(third), first), 1)))
        return out


def unet() -> Built:
    return UNet(), {"image": _numbers(ROWS, 3, _SIDE, _SIDE), "labels": _classes(ROWS, _SIDE, _SIDE)}, _class_loss


class RecurrentLanguageModel(nn.Module):
    """Ids to logits of the next one through recurrent layers."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layer = layer(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.embedding(ids))[0])
        return logits.flatten(0, 1)


def _next_loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch["labels"].flatten())


def lstm() -> Built:
    ids = token_ids()
    return RecurrentLanguageModel(nn.LSTM), {"ids": ids, "labels": ids.roll(-1, 1)}, _next_loss


def gru() -> Built:
    ids = token_ids()
    return RecurrentLanguageModel(nn.GRU), {"ids": ids, "labels": ids.roll(-1, 1)}, _next_loss


class TwoTowers(nn.Module):
    """Users and items as bags of ids, through a tower each, to the logit of a click."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.EmbeddingBag(60, 16, mode="sum")
        self.items = nn.EmbeddingBag(90, 16, mode="mean")
        self.user_tower = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))
        self.item_tower = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))

    def forward(self, user: Tensor, weights: Tensor, item: Tensor, clicked: Tensor) -> Tensor:
        left = self.user_tower(self.users(user, per_sample_weights=weights))
        right = self.item_tower(self.items(item))
        return (left * right).sum(-1)


def _click_loss(output: Tensor, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, batch["clicked"])


def two_towers() -> Built:
    batch = {
        "user": _classes(ROWS, 5, high=60), "weights": _numbers(ROWS, 5), "item": _classes(ROWS, 7, high=90),
        "clicked": _classes(ROWS, high=2).float(),
    }
    return TwoTowers(), batch, _click_loss


class GraphNetwork(nn.Module):
    """Messages along edges, added up at the nodes by index_add, in a batch of small graphs that is one large graph."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.updates = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))
        self.head = nn.Linear(16, 1)

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
        rows, count, width = nodes.shape
        first = torch.arange(rows).unsqueeze(1) * count
        state, source, target = nodes.flatten(0, 1), (source + first).flatten(), (target + first).flatten()
        for message, update in zip(self.messages, self.updates, strict=True):
            received = torch.zeros_like(state).index_add(0, target, F.relu(message(state[source])))
            state = state + F.relu(update(torch.cat((state, received), -1)))
        out: Tensor = self.head(state.view(rows, count, width).mean(1))
        return out.squeeze(-1)


def _square_loss(output: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(output, batch["wanted"])


def graph_network() -> Built:
    batch = {
        "nodes": _numbers(ROWS, 10, 16), "source": _classes(ROWS, 24, high=10),
        "target": _classes(ROWS, 24, high=10).flip(0), "wanted": _numbers(ROWS),
    }
    return GraphNetwork(), batch, _square_loss


class UnevenPerceptron(nn.Module):
    """Residual layers whose sizes have few divisors in common."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(100, 30) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(30, 100) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(100) for _ in range(2))
        self.head = nn.Linear(100, 7)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for down, up, norm in zip(self.down, self.up, self.norms, strict=True):
            x = x + up(F.gelu(down(norm(x))))
        out: Tensor = self.head(x)
        return out


def uneven_perceptron() -> Built:
    return UnevenPerceptron(), {"x": _numbers(ROWS, 100), "labels": _classes(ROWS, high=7)}, _class_loss


ENTRIES: tuple[Entry, ...] = (
    Entry(name="conv-classifier", family="networks", build=conv_classifier),
    Entry(name="u-net", family="networks", build=unet),
    Entry(name="lstm", family="networks", build=lstm),
    Entry(name="gru", family="networks", build=gru),
    Entry(name="two-towers", family="networks", build=two_towers),
    Entry(name="graph-network", family="networks", build=graph_network),
    Entry(name="uneven-perceptron", family="networks", build=uneven_perceptron),
)
