"""What the benchmark of the emulated cluster rests on: what an op takes on a paced device, and when it can run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import paced
from emulated_hosts import why_not

aten = torch.ops.aten


def seconds(func: Any, *args: Any) -> float:
    """What a device of speed 2 takes for an op; 0.0 for one that takes nothing."""
    cost = paced.Paced(2.0)._cost(func)
    return cost(args, {}, func(*args)) if cost is not None else 0.0


def test_products_take_their_flops_and_others_their_bytes() -> None:
    a, b = torch.ones(64, 128), torch.ones(128, 32)
    assert seconds(aten.mm.default, a, b) == pytest.approx(2 * 64 * 128 * 32 / (2 * paced.FLOPS_PER_S))
    thin = seconds(aten.mm.default, torch.ones(64, 1), torch.ones(1, 64))
    assert thin == pytest.approx(4 * (64 + 64 + 64 * 64) / (2 * paced.BYTES_PER_S)), "bound by memory"
    assert seconds(aten.add.Tensor, a, a) == pytest.approx(4 * 3 * 64 * 128 / (2 * paced.BYTES_PER_S))
    assert seconds(aten.view.default, a, [128, 64]) == 0.0


def test_attention_takes_two_products_forward_and_five_backward() -> None:
    q = torch.ones(1, 2, 256, 64)
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    product_s = 2.0 * q.numel() * 256 / (2 * paced.FLOPS_PER_S)
    out, logsumexp = attention.default(q, q, q)
    assert seconds(attention.default, q, q, q) == pytest.approx(2 * product_s)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert seconds(backward, q, q, q, q, out, logsumexp, 0.0, False) == pytest.approx(5 * product_s)


def test_what_is_lacking_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "network namespaces need root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert why_not() == "ip and tc cannot be found (Debian: apt-get install iproute2)"
