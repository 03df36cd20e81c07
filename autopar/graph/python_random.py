"""Random numbers that a forward draws outside torch, which a graph cannot draw anew at each step."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

from autopar.errors import CaptureError


def _numpy_state() -> object:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    name, keys, *rest = numpy.random.get_state()
    return name, keys.tobytes(), *rest


@contextlib.contextmanager
def refusing_python_draws(name: str) -> Iterator[None]:
    """CaptureError at the end if Python's or numpy's global random numbers were drawn inside.

    What such a draw decides (which layers to skip, which times to mask) would be the same at every step.
    """
    python, numpy = random.getstate(), _numpy_state()
    yield
    drawn = [word for word, same in (("random", random.getstate() == python), ("numpy.random", _numpy_state() == numpy))
             if not same]
    if drawn:
        raise CaptureError(
            f"{name}: the forward draws numbers with {' and '.join(drawn)}, and a graph would repeat this one draw at "
            "every step; turn it off in training (masking and layer drop have settings such as mask_time_prob, "
            "mask_feature_prob and layerdrop), or draw with torch on the batch's device"
        )
