"""The calls of every ruled op, from all files of samples."""

# Each of these files adds its samples as it is imported.
import experts_samples  # noqa: F401
import image_samples  # noqa: F401
import kernels_samples  # noqa: F401
import layer_samples  # noqa: F401
import linears_samples  # noqa: F401
import network_samples  # noqa: F401
import patch_samples  # noqa: F401
import pointwise_samples  # noqa: F401
import sum_samples  # noqa: F401
import view_samples  # noqa: F401
from sampling import SAMPLES, Maker, Pick, draws

__all__ = ["SAMPLES", "Maker", "Pick", "draws"]
