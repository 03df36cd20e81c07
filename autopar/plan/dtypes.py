"""The dtypes that a plan can compute in, and the one that its parameters rest in."""

from autopar.errors import InputError

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def torch_dtype(word: str) -> str:
    """torch's name of a dtype given by that or by its short name; InputError for another word."""
    name = SHORT_NAMES.get(word, word)
    if name not in SHORT_NAMES.values():
        raise InputError(f"unknown dtype {word!r}; use one of {', '.join(SHORT_NAMES)}")
    return name


def param_dtype(dtype: str) -> str:
    """The dtype that parameters rest in while the model computes in `dtype`: four bytes, or float64's own."""
    return "float64" if dtype == "float64" else "float32"
