"""Every entry's best plan with a tensor axis of two ranks: loss and every gradient against one process, in float64."""

from __future__ import annotations

import pytest
from all_entries import ENTRIES
from entry import Entry
from harness import captured, num_split_ops, parity, tensor_plan

from autopar.errors import InputError
from autopar.runtime.local import LocalPool

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]  # transformers' own deprecations


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_two_tensor_ranks_give_the_numbers_of_one_process(entry: Entry, pool: LocalPool) -> None:
    if entry.parity_refused:
        with pytest.raises(InputError) as caught:
            parity(entry, tensor_plan(entry), pool)
        assert entry.parity_refused in str(caught.value)
        return
    plan = tensor_plan(entry)
    assert bool(num_split_ops(plan)) != bool(entry.may_repeat), plan.notes
    report = parity(entry, plan, pool)
    assert report.passed, f"loss {report.loss_error:.1e}, worst {report.worst}"
    assert report.tolerance == 1e-9
    assert len(report.gradient_errors) == sum(info.requires_grad for info in captured(entry).graph.params)
