"""Models without the data of their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import nn


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside, modules are made with parameters that have a shape and no data; buffers are as ever.

    One parameter at a time is real while it is made. For models whose weights are read from files.
    """
    register = nn.Module.register_parameter

    def without_data(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    with patch.object(nn.Module, "register_parameter", without_data):
        yield
