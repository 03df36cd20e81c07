"""Losses put together from micro-batches, in one process, against the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.cluster.local import local_cluster
from autopar.errors import InputError
from autopar.graph.capture import capture
from autopar.runtime.engine import Trainer
from autopar.runtime.loss import Term, loss_terms
from autopar.search.degrees import Degrees, plan_from_degrees

CLASSES = 6


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = nn.Linear(7, CLASSES)
        self.register_buffer("weight", torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (8, 9), generator=generator)
    labels[:3, 2:] = -100
    labels[5] = -100  # a micro-batch with no target at all
    labels[4] = -100
    return {"x": torch.randn(8, 9, 5, dtype=torch.float64, generator=generator), "labels": labels}


def flat(out: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return out.view(-1, CLASSES), batch["labels"].view(-1)


def mean_entropy(out: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(*flat(out, batch))


def summed_entropy(out: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(*flat(out, batch), reduction="sum")


def smooth_entropy(out: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(*flat(out, batch), label_smoothing=0.1)


def entropy_and_penalty(out: Tensor, batch: Any) -> Tensor:
    return 0.5 * F.cross_entropy(*flat(out, batch)) + 0.1 * out.pow(2).mean() - out.abs().sum() / 1000


def mean_square(out: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(out, torch.ones_like(out))


def mean_of_rows(out: Tensor, batch: Any) -> Tensor:
    return (out.exp().sum(dim=-1) + 1).mean()


def square_a_row(out: Tensor, batch: Any) -> Tensor:
    return out.pow(2).sum() / out.shape[0]


def square_an_element(out: Tensor, batch: Any) -> Tensor:
    return out.pow(2).sum() / out.numel()


def mean_times_rows(out: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(out, torch.zeros_like(out)) * out.shape[0]


def likelihood(out: Tensor, batch: Any) -> Tensor:
    logits, labels = flat(out, batch)
    return F.nll_loss(F.log_softmax(logits, dim=-1), labels)


def mean_of_sums(out: Tensor, batch: Any) -> Tensor:
    return out.pow(2).sum(dim=0).mean() * 0.5


def masked_mean(out: Tensor, batch: Any) -> Tensor:
    valid = batch["labels"].ne(-100).unsqueeze(-1).double()
    return (out.pow(2) * valid).sum() / valid.sum()


def entropy_over_own_count(out: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(*flat(out, batch), reduction="sum") / batch["labels"].ne(-100).sum()


def contrastive(out: Tensor, batch: Any) -> Tensor:
    pooled = out.mean(dim=1)
    return F.cross_entropy(pooled @ pooled.T, torch.arange(pooled.shape[0]))


def root_of_mean(out: Tensor, batch: Any) -> Tensor:
    return out.pow(2).mean().sqrt()


def log_of_sum(out: Tensor, batch: Any) -> Tensor:
    return out.flatten().logsumexp(dim=0)


def weighed_by_counts(out: Tensor, batch: Any) -> Tensor:
    counts = torch.histc(batch["labels"].float(), bins=4, min=0, max=4)
    return (counts.to(out.dtype) * out.mean()).sum()


def weighed_by_a_share(out: Tensor, batch: Any) -> Tensor:
    return out.mean() * batch["labels"].ne(-100).to(out.dtype).mean()


TERMS = {
    mean_entropy: [Term.COUNT], summed_entropy: [Term.SUM], smooth_entropy: [Term.COUNT], mean_square: [Term.SHARE],
    entropy_and_penalty: [Term.COUNT, Term.SHARE, Term.SUM], mean_of_rows: [Term.SHARE],
    square_a_row: [Term.SHARE], square_an_element: [Term.SHARE], mean_times_rows: [Term.SUM], likelihood: [Term.COUNT],
    mean_of_sums: [Term.SUM],
}
WHOLE_ONLY = [masked_mean, entropy_over_own_count, contrastive, root_of_mean, log_of_sum, weighed_by_counts,
              weighed_by_a_share]


def numbers(loss_fn: Callable[[Tensor, Any], Tensor], micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Classifier().double()
    captured = capture(model, rows(), loss_fn=loss_fn, tag_rows=True)
    degrees = Degrees(global_batch=8, micro_batch=micro_batch, dtype="float64", param_dtype="float64")
    plan = plan_from_degrees(captured.graph, local_cluster(1, device="cpu"), degrees)
    trainer = Trainer(model, plan, captured, torch.optim.SGD)
    return trainer.forward_backward(rows()), trainer.full_gradients()


@pytest.mark.parametrize("loss_fn", TERMS, ids=lambda fn: fn.__name__)
def test_micro_batches_add_up_to_the_whole_batch(loss_fn: Callable[[Tensor, Any], Tensor]) -> None:
    torch.manual_seed(0)
    model = Classifier().double()
    graph = capture(model, rows(), loss_fn=loss_fn, tag_rows=True).graph
    assert sorted(term for _, term in loss_terms(graph).terms) == sorted(TERMS[loss_fn])
    batch = rows()
    expected = loss_fn(model(**batch), batch)
    expected.backward()
    loss, gradients = numbers(loss_fn, micro_batch=2)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for name, param in model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(gradients[name], param.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss_fn", WHOLE_ONLY, ids=lambda fn: fn.__name__)
def test_a_loss_that_parts_do_not_give_runs_whole_or_is_refused(loss_fn: Callable[[Tensor, Any], Tensor]) -> None:
    with pytest.raises(InputError, match="does not follow from those of its parts"):
        numbers(loss_fn, micro_batch=2)
    torch.manual_seed(0)
    model = Classifier().double()
    batch = rows()
    expected = loss_fn(model(**batch), batch)
    torch.testing.assert_close(numbers(loss_fn, micro_batch=8)[0], expected.detach(), rtol=1e-12, atol=0)


def test_a_slice_that_holds_nothing_mixes_no_rows() -> None:
    """Rotations of all of a head's channels leave an empty rest."""
    class Rotated(Classifier):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            hidden = self.body(x)
            turned, rest = hidden[..., : hidden.shape[-1]].sin(), hidden[..., hidden.shape[-1] :]
            return self.head(torch.cat([turned, rest], dim=-1)).mean()

    assert not loss_terms(capture(Rotated().double(), rows(), tag_rows=True).graph).notes


def test_batch_norms_are_noted() -> None:
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in (7, CLASSES))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            hidden = self.norms[0](self.body(x).flatten(0, 1))
            return self.norms[1](self.head(hidden)).square().mean()

    graph = capture(Normed().double(), rows(), tag_rows=True).graph
    (note,) = loss_terms(graph).notes
    assert "aten.batch_norm.default" in note
    assert "(and in 1 more) mixes rows: it sees one micro-batch of one data rank" in note
    assert not loss_terms(graph, num_parts=1).notes
    assert not loss_terms(capture(Classifier().double(), rows(), loss_fn=mean_entropy, tag_rows=True).graph).notes


def test_buffers_written_by_each_part_are_noted() -> None:
    class Counting(Classifier):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            self.weight.add_(1)
            return self.head(self.body(x)).square().mean()

    (note,) = loss_terms(capture(Counting().double(), rows(), tag_rows=True).graph).notes
    assert "weight" in note and note.endswith("is written to once in each micro-batch")


def test_class_weights_are_counted_with_their_weight() -> None:
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)

    class Weighted(Classifier):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            logits = super().forward(x, labels)
            return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1), weight=self.weight)

    torch.manual_seed(0)
    model = Weighted().double()
    captured = capture(model, rows(), tag_rows=True)
    degrees = Degrees(global_batch=8, micro_batch=2, dtype="float64", param_dtype="float64")
    plan = plan_from_degrees(captured.graph, local_cluster(1, device="cpu"), degrees)
    loss = Trainer(model, plan, captured, torch.optim.SGD).forward_backward(rows())
    torch.testing.assert_close(loss, model(**rows()).detach(), rtol=1e-12, atol=0)
    assert torch.equal(weight, model.weight)


def test_targets_that_the_model_learns_are_refused() -> None:
    class Learned(Classifier):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            logits = super().forward(x, labels).view(-1, CLASSES)
            return F.cross_entropy(logits, self.body.weight.argmax() + labels.view(-1))

    model = Learned().double()
    captured = capture(model, rows(), tag_rows=True)
    degrees = Degrees(global_batch=8, micro_batch=2, dtype="float64", param_dtype="float64")
    plan = plan_from_degrees(captured.graph, local_cluster(1, device="cpu"), degrees)
    with pytest.raises(InputError, match="targets of the loss depend on"):
        Trainer(model, plan, captured, torch.optim.SGD)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler, about torch
def test_a_compiled_plan_gives_the_same_loss_and_gradients() -> None:
    batch = rows()
    torch.manual_seed(0)
    model = Classifier().double()
    expected = mean_entropy(model(**batch), batch)
    expected.backward()
    captured = capture(model, batch, loss_fn=mean_entropy, tag_rows=True)
    degrees = Degrees(global_batch=8, micro_batch=4, dtype="float64", param_dtype="float64", compile=True)
    plan = plan_from_degrees(captured.graph, local_cluster(1, device="cpu"), degrees)
    trainer = Trainer(model, plan, captured, torch.optim.SGD)
    torch.testing.assert_close(trainer.forward_backward(batch), expected.detach(), rtol=1e-12, atol=0)
    gradients = trainer.full_gradients()
    for name, param in model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(gradients[name], param.grad, rtol=1e-10, atol=1e-14)
