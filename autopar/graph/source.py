"""Where models come from: shipped presets, Hugging Face config files, and Python factories."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.errors import AutoparError, InputError
from autopar.graph.capture import LossFn, capture
from autopar.graph.empty_parameters import empty_parameters
from autopar.graph.fake import (
    DATA_DEPENDENT_ERRORS,
    is_in_fake_mode,
    outside_other_modes,
    shapes_alone,
    values_not_needed,
)
from autopar.graph.hugging_face import attention_of
from autopar.graph.lean_transformers import lean_transformers
from autopar.graph.model_graph import ModelGraph
from autopar.graph.without_cuda import cpu_alone, cpu_without_cuda

Built = tuple[nn.Module, dict[str, Any] | tuple[Any, ...], LossFn | None]
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS = 2
_MAX_DEFAULT_SEQ_LEN = 2048
_SAMPLES = 160_000  # ten seconds of sound at 16 kHz
_BOTH_WAYS = ("bert", "roberta", "deberta-v2", "electra", "xlm-roberta")  # some have a causal class besides
_PADDED_POSITIONS = ("roberta", "xlm-roberta")  # positions are counted from behind the padding token's id


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A named way to build a model. `build()` gives (module, example_batch, loss_fn or None).

    Under FakeTensorMode it gives fake weights, elsewhere real ones, initialized from torch's current seed.
    """

    name: str
    build: Callable[[], Built]


def preset_names() -> tuple[str, ...]:
    """The names of the shipped models."""
    folder = resources.files("autopar.graph") / "presets"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def load_source(spec: str, *, seq_len: int | None = None, dtype: str = "float32",
                attention: str = "sdpa", rows: int = _ROWS) -> ModelSource:
    """The model that `spec` names: a preset, a config.json (file or folder), or `path/file.py:factory`.

    `seq_len` defaults to the model's longest, at most 2048; a factory brings its own batch, so that it takes none.
    `rows`: of the example batch, which a factory brings too.
    Raises InputError with one line for whatever is not there.
    """
    if dtype not in _DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    if attention not in ("sdpa", "eager"):
        raise InputError(f"unknown attention {attention!r}; known: sdpa, eager")
    if seq_len is not None and seq_len < 1:
        raise InputError(f"the sequence length must be at least 1, not {seq_len}")
    path_text, colon, factory = spec.rpartition(":")
    if colon and path_text.endswith(".py"):
        if seq_len is not None:
            logging.getLogger(__name__).info("%s brings its own batch; seq_len is not used", spec)
        return _factory_source(Path(path_text), factory, dtype)
    if spec.endswith(".py"):
        raise InputError(f"{spec}: name the factory too, as in {spec}:make_model")
    if spec in preset_names():
        text = (resources.files("autopar.graph") / "presets" / f"{spec}.json").read_text(encoding="utf-8")
        name, values = spec, json.loads(text)
    else:
        path = Path(spec)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file() and (path.suffix == ".json" or Path(spec).is_dir()):
            raise InputError(f"no file {str(path)!r}: name a Hugging Face config.json or its folder")
        if not path.is_file():
            near = difflib.get_close_matches(spec, preset_names(), n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"presets: {', '.join(preset_names())}"
            raise InputError(f"no model {spec!r}: neither a preset nor a config file or folder nor file.py:factory; "
                             + hint)
        name, values = path.parent.name if path.name == "config.json" else path.stem, _read_json(path)
    return ModelSource(name=name or spec, build=partial(_build_config, spec, values, seq_len, dtype, attention, rows))


def capture_source(source: ModelSource, *, fuse: bool = False) -> ModelGraph:
    """The source's graph with tagged rows, captured without any weight: what the planner works on.

    `fuse`: with norms, activations and losses as the kernels that training systems have for them.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, batch, loss_fn = source.build()
    return capture(module, batch, loss_fn=loss_fn, tag_rows=True, name=source.name, fuse=fuse).graph


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error}); name a Hugging Face config.json") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise InputError(f"{path}: not a Hugging Face config (no \"model_type\" with a name)")
    return values


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _build_config(
    spec: str, values: dict[str, Any], seq_len: int | None, dtype: str, attention: str, rows: int
) -> Built:
    try:
        lean_transformers()
        import transformers
    except ImportError as error:
        raise InputError(f"{spec}: Hugging Face configs need transformers (pip install transformers)") from error
    with _quiet_transformers():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

        values = dict(values)
        model_type = values.pop("model_type")
        if model_type not in CONFIG_MAPPING:
            near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=3, cutoff=0.4)
            raise InputError(f"{spec}: transformers {transformers.__version__} does not know the model_type "
                             f"{model_type!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
        try:
            config = AutoConfig.for_model(model_type, **values)
            config.use_cache = False
            model_class = _model_class(config)
            options: dict[str, Any] = {"dtype": _DTYPES[dtype],
                                       "attn_implementation": attention_of(model_class, attention)}
            if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
                # The kernel for groups of rows has no float64.
                options["experts_implementation"] = "eager" if dtype == "float64" else "grouped_mm"
            with shapes_alone():
                model = model_class._from_config(config, **options)
            batch = {
                key: value.to(_DTYPES[dtype]) if torch.is_tensor(value) and value.is_floating_point() else value
                for key, value in _example_batch(spec, model, config, seq_len, rows).items()
            }  # as a trainer casts what it is given
        except AutoparError:
            raise
        except Exception as error:  # whatever transformers raises for a value that it cannot work with
            raise InputError(f"{spec}: transformers {transformers.__version__} cannot build a model of this config "
                             f"({type(error).__name__}: {_one_line(error)}); correct the value") from error
    model.train()
    return model, batch, None


def _one_line(error: BaseException) -> str:
    """What an error says, without line breaks and not endlessly."""
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= 300 else text[:297] + "..."


def _model_class(config: Any) -> Any:
    """The class that computes a training loss for this config: its architecture's, or the usual one of its kind."""
    from transformers.models.auto import modeling_auto

    for name in getattr(config, "architectures", None) or ():
        found = _class_named(str(name), config)
        if found is not None and not {"labels", "return_loss"}.isdisjoint(_arguments(found)):
            return found
    if getattr(config, "is_encoder_decoder", False):
        kinds = ["Seq2SeqLM", "SpeechSeq2Seq"]
    elif config.model_type in _BOTH_WAYS:
        kinds = ["MaskedLM"]
    elif config.model_type == "clip":  # its classifier of images is one tower alone
        kinds = ["ZeroShotImageClassification"]
    else:
        kinds = ["CausalLM", "ImageClassification", "MaskedLM", "AudioClassification", "ZeroShotImageClassification"]
    for kind in kinds:
        auto = getattr(modeling_auto, f"AutoModelFor{kind}")
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise InputError(f"no model with a training loss is known for model_type {config.model_type!r}; "
                     "write a factory and pass file.py:factory")


def _class_named(name: str, config: Any) -> Any:
    """The class of transformers with this name, None where there is none."""
    import transformers

    beside = sys.modules[type(config).__module__.rpartition(".")[0]]  # what is there is found without its index of all
    return getattr(beside, name, None) or getattr(transformers, name, None)


def _arguments(model_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def _example_batch(spec: str, model: nn.Module, config: Any, seq_len: int | None, rows: int) -> dict[str, Any]:
    """Rows of random ids, pixels or sounds, with labels, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    if "return_loss" in _arguments(type(model)) and hasattr(config, "vision_config"):
        ids = _ids(spec, config.text_config, seq_len, rows, generator)
        return {"input_ids": ids, "pixel_values": _pixels(config.vision_config, rows, generator), "return_loss": True}
    classes = {"labels": torch.randint(0, config.num_labels, (rows,), generator=generator)}
    match model.main_input_name:
        case "pixel_values":
            return {"pixel_values": _pixels(config, rows, generator), **classes}
        case "input_values":
            samples = seq_len or _SAMPLES
            return {"input_values": torch.randn((rows, samples), generator=generator), **classes}
        case "input_features" if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
            frames = (rows, config.num_mel_bins, 2 * config.max_source_positions)
            return {"input_features": torch.randn(frames, generator=generator),
                    "labels": _ids(spec, config, seq_len, rows, generator)}
    batch = {"input_ids": _ids(spec, config, seq_len, rows, generator)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = _ids(spec, config, seq_len, rows, generator)
    batch["labels"] = _ids(spec, config, seq_len, rows, generator)
    return batch


def _pixels(config: Any, rows: int, generator: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn((rows, config.num_channels, height, width), generator=generator)


def _ids(spec: str, config: Any, seq_len: int | None, rows: int, generator: torch.Generator) -> Tensor:
    longest = next((value for key in ("max_target_positions", "max_position_embeddings", "n_positions", "n_ctx")
                    if (value := getattr(config, key, None))), None)
    if longest is not None and config.model_type in _PADDED_POSITIONS:
        longest -= config.pad_token_id + 1
    if seq_len is not None and longest is not None and seq_len > longest:
        raise InputError(f"{spec}: the sequence length {seq_len} is beyond the model's {longest} positions")
    length = seq_len or min(longest or _MAX_DEFAULT_SEQ_LEN, _MAX_DEFAULT_SEQ_LEN)
    return torch.randint(0, config.get_text_config().vocab_size, (rows, length), generator=generator)


def _factory_source(path: Path, factory: str, dtype: str) -> ModelSource:
    if not path.is_file():
        raise InputError(f"no file {str(path)!r} (from {path}:{factory})")
    module_name = f"_autopar_user_{abs(hash(str(path.resolve())))}"
    found = importlib.util.spec_from_file_location(module_name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    try:
        with _beside(path):
            found.loader.exec_module(module)
    except AutoparError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: importing it failed: {type(error).__name__}: {_one_line(error)}") from error
    function = getattr(module, factory, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(factory, names, n=3, cutoff=0.4)
        raise InputError(f"{path} has no function {factory!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return ModelSource(name=factory, build=partial(_build_factory, path, factory, function, dtype))


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """While inside, modules that lie beside the file can be imported."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _build_factory(path: Path, factory: str, function: Callable[[], Any], dtype: str) -> Built:
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPES[dtype])
    try:
        with _beside(path):
            made = _called(function, f"{path}:{factory}")
    except AutoparError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}:{factory} failed: {type(error).__name__}: {_one_line(error)}") from error
    finally:
        torch.set_default_dtype(before)
    if isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module):
        loss_fn = made[2] if len(made) == 3 else None
        batch = dict(made[1]) if isinstance(made[1], Mapping) else made[1]
        if isinstance(batch, (dict, tuple, list)) and (loss_fn is None or callable(loss_fn)):
            return made[0], tuple(batch) if isinstance(batch, list) else batch, loss_fn
    raise InputError(f"{path}:{factory} must return (model, example_batch) or (model, example_batch, loss_fn); the "
                     "batch is a dict of keyword arguments or a tuple")


def _called(function: Callable[[], Any], name: str) -> Any:
    """What a factory returns. Under a fake mode, if it asks for the values of its data, only parameters have none."""
    try:
        with values_not_needed(), cpu_without_cuda():
            return function()
    except DATA_DEPENDENT_ERRORS as error:
        if not is_in_fake_mode():
            raise
        logging.getLogger(__name__).info("%s reads its data (%s): its batch is real", name, _one_line(error))
    with outside_other_modes(), empty_parameters(), cpu_alone():
        return function()
