"""What all ranks of an axis compute together under lowerings that communicate, on tensors of one process."""

from __future__ import annotations

import torch

from autopar.sharding.rules.windows import Halo

T = torch.Tensor


def with_borders(parts: list[T], halo: Halo) -> list[T]:
    """Every rank's part with the positions that it borrows; what is borrowed keeps its gradient."""
    dim, found = halo.dim, []
    for rank, part in enumerate(parts):
        length = part.shape[dim]
        before = parts[rank - 1].narrow(dim, length - halo.before, halo.before) if rank else None
        after = parts[rank + 1].narrow(dim, 0, halo.after) if rank < len(parts) - 1 else None
        if before is None:
            before = _beyond(part.narrow(dim, 0, 1), dim, halo.before, halo.fill)
        if after is None:
            after = _beyond(part.narrow(dim, length - 1, 1), dim, halo.after, halo.fill)
        found.append(torch.cat((before, part, after), dim))
    return found


def _beyond(border: T, dim: int, length: int, fill: str) -> T:
    repeated = torch.cat([border] * length, dim) if length else border.narrow(dim, 0, 0)
    return repeated if fill == "edge" else torch.full_like(repeated, {"zero": 0.0, "lowest": -float("inf")}[fill])


def whole_batch_norm(ranks: list[list[T]], operands: dict[str, int], momentum: float, eps: float) -> list[list[T]]:
    """Batch norms of parts with the statistics of all of them; running statistics are written to on every rank."""
    x = [given[0] for given in ranks]
    dims = [0, *range(2, x[0].dim())]
    shape = [1, -1, *[1] * (x[0].dim() - 2)]
    count = sum(part.numel() for part in x) // x[0].shape[1]
    mean = sum(part.sum(dims) for part in x) / count
    square = sum((part - mean.view(shape)).square().sum(dims) for part in x)
    results = []
    for given in ranks:
        out = (given[0] - mean.view(shape)) / (square / count + eps).sqrt().view(shape)
        if "weight" in operands:
            out = out * given[operands["weight"]].view(shape)
        if "bias" in operands:
            out = out + given[operands["bias"]].view(shape)
        results.append([out])
        if "running_mean" in operands:
            with torch.no_grad():
                given[operands["running_mean"]].mul_(1 - momentum).add_(momentum * mean)
                given[operands["running_var"]].mul_(1 - momentum).add_(momentum * square / (count - 1))
    return results
