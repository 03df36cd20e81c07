"""A model with an operator of your own, and the one line that tells autopar how it may be split:

python examples/custom_op.py
"""

import torch
from torch import Tensor, nn

import autopar


@torch.library.custom_op("example::gated_product", mutates_args=())
def gated_product(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """(x * sigmoid(gate)) @ weight.T, of x and gate (rows, tokens, features) and weight (outputs, features)."""
    return (x * gate.sigmoid()) @ weight.T


@gated_product.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def backward(ctx, grad):
    x, gate, weight = ctx.saved_tensors
    open_ = gate.sigmoid()
    product = grad @ weight
    return product * open_, product * x * open_ * (1 - open_), torch.einsum("bto,bti->oi", grad, x * open_)


gated_product.register_autograd(
    backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Layer(nn.Module):
    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(features, inner), nn.Linear(features, inner)
        self.down = nn.Parameter(torch.randn(features, inner) / inner**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + gated_product(self.up(x), self.gate(x), self.down)


class Model(nn.Module):
    def __init__(self, features: int, inner: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(features, inner) for _ in range(num_layers))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.mse_loss(x, target)


def plan() -> autopar.Plan:
    with torch.device("meta"):
        model = Model(features=8192, inner=32768, num_layers=8).to(torch.bfloat16)
        batch = {name: torch.zeros(1, 2048, 8192, dtype=torch.bfloat16) for name in ("x", "target")}
    return autopar.plan(model, batch, cluster="1x8xH100-80GB", global_batch=8, max_search_seconds=30)


before = plan()
print(f"without a rule: a step of {before.certificate.upper_bound_s * 1e3:.1f} ms")
print(*(note for note in before.notes if "without a sharding rule" in note), sep="\n")

# Each name is a dimension: batch, token, inner feature, output. Summing over `i` may be split, and so may b, t and o.
autopar.register_rule("example.gated_product.default", "b t i, b t i, o i -> b t o")

after = plan()
print(f"with the rule:  a step of {after.certificate.upper_bound_s * 1e3:.1f} ms")
print(after)
