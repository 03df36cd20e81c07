"""Ops that make tensors from numbers, and checks: they run whole on every rank."""

from __future__ import annotations

from autopar.sharding.factors import OpFactors
from autopar.sharding.rules.registry import Call, rule

_CREATION = """
arange full zeros ones empty eye linspace logspace scalar_tensor tensor new_zeros new_ones new_full new_empty
tril_indices triu_indices one_hot diff meshgrid nonzero masked_select unique_dim bincount rand randn randint randperm
_assert_tensor_metadata _assert_async sym_size sym_numel item _local_scalar_dense is_nonzero bucketize searchsorted
"""


@rule(*(f"aten.{name}" for name in _CREATION.split()))
def creation(call: Call) -> OpFactors:
    return call.unsplit("the op runs whole on every rank")
