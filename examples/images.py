"""Train a small ResNet on images, with batch norm and a loss function of its own:

python examples/images.py
torchrun --nproc-per-node 2 examples/images.py

Under data parallelism each process normalizes its own rows, as torch's DistributedDataParallel does; the plan says so.
"""

import torch
from torch import Tensor, nn

import autopar


class Residual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList([Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1)])
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


def cross_entropy(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(logits, batch["labels"])


torch.manual_seed(0)
model = ResNet(num_classes=4)
labels = torch.arange(32) % 4
images = torch.randn(32, 3, 16, 16) + labels.view(-1, 1, 1, 1)  # a class is a brightness
batch = {"images": images, "labels": labels}

trainer = autopar.parallelize(
    model, batch, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), loss_fn=cross_entropy
)
first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
if first:
    print(trainer.plan)
for step in range(10):
    loss = trainer.step(batch)
    if first:
        print(f"step {step}: loss {loss.item():.4f}")
