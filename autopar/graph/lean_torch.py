"""torch and transformers without what a capture never needs, which their own modules import.

Fake tensors bring `torch._dynamo`, which imports FSDP, and all that splits a compiled graph into forward and backward;
`torch.export` the formats of saved programs; transformers distributed checkpoints, accelerate and chat templates.
"""

from __future__ import annotations

from autopar.graph.lazy_modules import lazily

_FULLY_SHARD = ("FSDPModule", "fully_shard", "register_fsdp_forward_method", "UnshardHandle")
_POLICIES = ("CPUOffloadPolicy", "MixedPrecisionPolicy", "OffloadPolicy")
_MODULES: dict[str, tuple[str, ...] | None] = {
    "torch.distributed._composable.fsdp": _FULLY_SHARD[:3] + _POLICIES,
    "torch.distributed.fsdp": _FULLY_SHARD + _POLICIES,
    "torch.distributed.fsdp._fully_shard": (),
    "torch.distributed.fsdp._fully_shard._fsdp_param_group": (),
    "torch.distributed.checkpoint": (),
    "torch.distributed.checkpoint.hf_storage": ("HuggingFaceStorageReader", "HuggingFaceStorageWriter"),
    "torch._functorch.partitioners": ("default_partition",),
    "torch.export.pt2_archive": (),
    "torch.export.pt2_archive._package_weights": ("TensorProperties", "Weights"),
    "torch.export.pt2_archive.constants": None,
    "torch.hub": ("_Faketqdm", "tqdm"),
    "psutil": (),
    "jinja2": (),
    "jinja2.exceptions": (),
    "jinja2.ext": ("Extension",),
    "jinja2.meta": (),
    "jinja2.nodes": (),
    "jinja2.runtime": (),
    "jinja2.sandbox": ("ImmutableSandboxedEnvironment",),
    "accelerate": ("PartialState", "dispatch_model"),
    "accelerate.hooks": ("AlignDevicesHook", "add_hook_to_module"),
    "accelerate.utils": (
        "extract_model_from_parallel", "get_balanced_memory", "get_max_memory", "infer_auto_device_map", "reduce"),
    "accelerate.utils.modeling": ("clean_device_map", "get_max_layer_size"),
}
# They take it for granted that the operators of FSDP and symmetric memory are registered.
_COMPILERS = ("torch._inductor.comm_lowering", "torch._inductor.compile_fx", "torch._inductor.lowering")


def lean_torch() -> None:
    """Lets torch and transformers be imported lean from here on, where they have not been."""
    lazily(_MODULES, askers=("torch", "transformers"), wakers=_COMPILERS)
