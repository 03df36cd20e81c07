"""What Hugging Face models need while they are traced. The one file that knows transformers' insides.

Traced, transformers builds a rows x 1 x seq x seq boolean mask that it would skip in a plain run, because it cannot
look at the values. While a model is captured, the mask function of "sdpa" takes the same decision as in a plain run
from what is known: the batch brings neither attention_mask nor position_ids, so the mask is plainly causal (attention
takes `is_causal`) or plainly absent.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from autopar.errors import CaptureError
from autopar.graph.collected import can_be_collected
from autopar.graph.experts import gate_text


def _pretrained(model: nn.Module) -> list[Any]:
    if "transformers.modeling_utils" not in sys.modules:
        return []
    from transformers.modeling_utils import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def attention_of(model_class: Any, wanted: str) -> str:
    """The attention implementation to build the class with: "eager" where it has none through PyTorch's fused op."""
    return "eager" if wanted == "sdpa" and not getattr(model_class, "_supports_sdpa", False) else wanted


@contextlib.contextmanager
def traceable(model: nn.Module, float_dtype: torch.dtype | None = None) -> Iterator[list[str]]:
    """While inside, Hugging Face modules in `model` trace well. Yields notes of what was changed; all is put back.

    `float_dtype` is the dtype that the model is captured in, where that is not its own.
    """
    notes: list[str] = []
    modules = _pretrained(model)
    if not modules:
        yield notes
        return
    with contextlib.ExitStack() as stack:
        for config in {id(module.config): module.config for module in modules}.values():
            _set(stack, config, "use_cache", False)
            if getattr(config, "output_router_logits", False) is True and not can_be_collected():
                raise CaptureError(f"{type(model).__name__}: the router's load-balancing loss cannot be captured (in "
                                   "this release of transformers its logits leave the layers in an unknown way); set "
                                   "output_router_logits=False in the config")
        checkpointing = [module for module in model.modules() if module.__dict__.get("gradient_checkpointing") is True]
        for module in checkpointing:
            _set(stack, module, "gradient_checkpointing", False)
        if checkpointing:
            notes.append("the model's own gradient checkpointing is ignored: the plan decides what is recomputed")
        logger = logging.getLogger("transformers")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        _plain_masks(stack, model, modules, notes)
        _one_op_for_experts(stack, model, float_dtype, notes)
        _one_op_for_norms_and_gelu(stack, model, notes)
        yield notes


def _set(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name, None)
    if before is not None and before != value:
        setattr(owner, name, value)
        stack.callback(setattr, owner, name, before)


def _outermost(model: nn.Module, modules: list[Any]) -> list[Any]:
    inner = {id(child) for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if id(module) not in inner]


def _plain_masks(stack: contextlib.ExitStack, model: nn.Module, modules: list[Any], notes: list[str]) -> None:
    from transformers import masking_utils

    register = masking_utils.AttentionMaskInterface.register
    registered = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    find_packed = getattr(masking_utils, "find_packed_sequence_indices", None)
    if find_packed is None:
        notes.append("this release of transformers is unknown: attention masks may be materialized")
        return
    given: set[str] = set()  # which of these the innermost running outermost model was called with

    def note_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        arguments = {**bound, **bound.get("kwargs", {})}
        given.clear()
        given.update(name for name in ("attention_mask", "position_ids") if arguments.get(name) is not None)

    def packed(position_ids: Any) -> Any:
        return find_packed(position_ids) if "position_ids" in given else None

    for module in _outermost(model, modules):
        handle = module.register_forward_pre_hook(note_arguments, with_kwargs=True)
        stack.callback(handle.remove)
    masking_utils.find_packed_sequence_indices = packed
    stack.callback(setattr, masking_utils, "find_packed_sequence_indices", find_packed)
    original = registered["sdpa"]
    register("sdpa", _plain_or(original))
    stack.callback(register, "sdpa", original)


_IMPLEMENTATION, _GATE = "autopar", "_autopar_gate"


def _one_op_for_experts(
    stack: contextlib.ExitStack, model: nn.Module, float_dtype: torch.dtype | None, notes: list[str]
) -> None:
    """Lets every module that follows transformers' shared experts interface trace to `autopar::experts`.

    One whose gate is no fixed list of ops, or that does more after its second product, traces to transformers' own
    grouped product op instead; nothing traces to the loop over the experts that happen to be hit.
    """
    from transformers.integrations import moe

    found = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    found = [module for module in found if hasattr(module, "is_transposed")]
    if not found:
        return
    texts: dict[Any, str | None] = {}
    for module in found:
        first = _first_weight(module)
        width, dtype = first.shape[2 if module.is_transposed else 1], float_dtype or first.dtype
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        key = (type(module), tuple(sorted(plain.items())), repr(module._modules), width, dtype)
        if key not in texts:
            texts[key] = None if module.has_post_expert_norm else gate_text(_gate_of(module), width, dtype)
        setattr(module, _GATE, texts[key])  # an attribute, so that layers whose gates differ are not folded into one
        stack.callback(delattr, module, _GATE)
    configs: dict[int, Any] = {id(module.config): module.config for module in found}
    for config in configs.values():
        stack.callback(setattr, config, "_experts_implementation", getattr(config, "_experts_implementation", None))
        config._experts_implementation = _IMPLEMENTATION
    moe.ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION] = _experts_forward
    stack.callback(moe.ALL_EXPERTS_FUNCTIONS.__delitem__, _IMPLEMENTATION)
    if others := sorted({type(module).__name__ for module in found if getattr(module, _GATE) is None}):
        stack.callback(setattr, moe, "_can_use_grouped_mm", moe._can_use_grouped_mm)
        moe._can_use_grouped_mm = lambda *args: False
        notes.append(f"{', '.join(others)}: not one op, run whole on every rank (a gate with parameters, random "
                     "numbers or more than rows, or a norm after the experts)")


def _one_op_for_norms_and_gelu(stack: contextlib.ExitStack, model: nn.Module, notes: list[str]) -> None:
    """Lets RMS norms and GELUs that are written out in many ops, each of which keeps tensors, trace to PyTorch's one.

    The values are the same but for rounding. Norms are known by their code, which most models copy from Llama's.
    """
    from transformers import activations
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    gelus = [getattr(activations, name, None) for name in ("NewGELUActivation", "AccurateGELUActivation")]
    norm_code = _code_of(LlamaRMSNorm.forward)
    kinds = dict.fromkeys(type(module) for module in model.modules())
    found = [kind for kind in kinds if kind in gelus]
    norms = [kind for kind in kinds if kind.__name__.endswith("RMSNorm") and _code_of(kind.forward) == norm_code]
    for kind in found:
        _set(stack, kind, "forward", _tanh_gelu)
    for kind in norms:
        _set(stack, kind, "forward", _rms_norm_or(kind.forward))
    if found or norms:
        names = ", ".join(kind.__name__ for kind in (*found, *norms))
        notes.append(f"{names}: run as PyTorch's own op (equal but for rounding)")


def _code_of(function: Callable[..., Any]) -> str | None:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None


def _tanh_gelu(module: nn.Module, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (as the module calls it)
    return nn.functional.gelu(input, approximate="tanh")


def _rms_norm_or(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = module.weight
        if hidden_states.dtype != weight.dtype:  # then the result has the wider dtype
            return original(module, hidden_states)
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, module.variance_epsilon)

    return forward


def _first_weight(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.gate_up_proj if module.has_gate else module.up_proj
    return weight


def _gate_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    gate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate if module.has_gate else module.act_fn
    return gate


def _experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts as one op."""
    gate = getattr(module, _GATE)
    if gate is None:
        from transformers.integrations import moe

        whole: torch.Tensor = moe.grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return whole
    prefix = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (getattr(module, f"{prefix}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    result: torch.Tensor = torch.ops.autopar.experts(
        hidden_states, top_k_index, top_k_weights, _first_weight(module), module.down_proj, *biases,
        module.is_transposed, gate,
    )[0]
    return result


def _plain_or(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        """None where sdpa needs no mask; transformers' own mask elsewhere."""
        size = kwargs.get("kv_length")
        plain = (
            not args and kwargs.get("attention_mask") is None and kwargs.get("q_length") == size
            and kwargs.get("q_offset", 0) == 0 and kwargs.get("kv_offset", 0) == 0
            and (kwargs.get("local_size") is None or size < kwargs["local_size"])
            and (kwargs.get("allow_is_causal_skip", True) or kwargs.get("allow_is_bidirectional_skip", False))
        )
        return None if plain else original(*args, **kwargs)

    return mask
