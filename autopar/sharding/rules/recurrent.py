"""Recurrent layers: rows split, and each runs its steps by itself."""

from __future__ import annotations

from autopar.graph.model_graph import Ref, refs_in
from autopar.sharding.factors import Dims, OpFactors
from autopar.sharding.lowering import Lowering
from autopar.sharding.rules.registry import Call, rule

_LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_SIGNATURE = "input hx params has_biases num_layers dropout train bidirectional batch_first"


@rule(*(f"aten.{name}.input" for name in _LAYERS), signature=_SIGNATURE)
def recurrent(call: Call) -> OpFactors:
    """The rows split. A step needs the one before it, and each of its features all features of that."""
    x = call.shape("input")
    place = 0 if call.get("batch_first", False) is True else 1
    rows = call.factor("b", x[place]) if len(x) == 3 else ()
    steps = call.factor("t", x[1 - place] if len(x) == 3 else x[0], "a step needs the one before it")

    def sequence(features: tuple[str, ...]) -> Dims:
        if len(x) == 2:
            return (steps, features)
        return (rows, steps, features) if place == 0 else (steps, rows, features)

    def states(name: str, prefix: str) -> Dims:
        shape, reason = call.tensors[name].shape, "a feature of a step needs all of the step before"
        layers, features = call.factor(f"{prefix}l", shape[0], reason), call.factor(f"{prefix}h", shape[-1], reason)
        return (layers, rows, features) if len(x) == 3 else (layers, features)

    weights = [
        call.factors(f"w{i}_", call.tensors[name].shape, "a feature of a step needs all of the step before")
        for i, name in enumerate(refs_in(call.args["params"]))
    ]
    given = call.args["hx"]
    initial = [states(name, f"i{i}") for i, name in enumerate(refs_in(given))]
    features = call.factor("k", x[-1], "a feature of a step needs all of the step before")
    outputs: list[Dims] = []
    for i, name in enumerate(call.op.outputs):
        if not name:
            outputs.append(())
        elif i == 0:
            made = call.tensors[name].shape[-1]
            outputs.append(sequence(call.factor("o", made, "a feature of a step needs all of the step before")))
        else:
            outputs.append(states(name, f"f{i}"))
    random = call.get("dropout", 0.0) != 0 and call.get("train", False) is True
    return call.build(
        {"input": sequence(features), "hx": initial[0] if isinstance(given, Ref) else initial, "params": weights},
        outputs, split_lowering=Lowering.AXIS_RANDOM if random else "",
    )
