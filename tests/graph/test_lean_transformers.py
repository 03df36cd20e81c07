"""transformers as `lean_transformers` imports it: in a process of its own, since it is imported once."""

from __future__ import annotations

import subprocess
import sys

import pytest

LEAN = """
import sys
from autopar.graph.lean_transformers import lean_transformers
lean_transformers()
lean = sys.modules["transformers"], sys.modules["transformers.models"]
"""


def _run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", LEAN + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("preset", ["gpt2", "llama-3.1-8b", "mixtral-8x7b", "vit-l", "bert-large"])
def test_presets_are_captured_without_the_list_of_all_models(preset: str) -> None:
    script = f"""
from autopar.graph.source import capture_source, load_source
graph = capture_source(load_source({preset!r}))
print(len(graph.blocks) > 3, [package._whole for package in lean])
"""
    assert _run(script) == "True [None, None]"


def test_every_public_name_is_there_and_is_the_same_class() -> None:
    script = """
import transformers
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
import transformers.utils
assert transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel is GPT2LMHeadModel
assert [package._whole for package in lean] == [None, None]
from transformers import AutoModelForCausalLM, GPT2LMHeadModel as public
from transformers.models import GPT2Config
assert public is GPT2LMHeadModel and lean[0].GPT2LMHeadModel is GPT2LMHeadModel
assert lean[0].GPT2Config is GPT2Config and GPT2Config in AutoModelForCausalLM._model_mapping
assert None not in [package._whole for package in lean]
assert sys.modules["transformers"] is not lean[0] and "T5Config" in dir(sys.modules["transformers"])
assert transformers.__version__ == sys.modules["transformers"].__version__
print(hasattr(transformers, "NoSuchModel"), hasattr(transformers.models, "NoSuchModel"))
"""
    assert _run(script) == "False False"


def test_the_versions_that_transformers_needs_are_checked_as_ever() -> None:
    assert _run("print('transformers.dependency_versions_check' in sys.modules)") == "True"


def test_an_imported_package_stays_as_it_is() -> None:
    script = "import sys, transformers as t; from autopar.graph.lean_transformers import lean_transformers as lean;" \
        "lean(); print(sys.modules['transformers'] is t)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("name", ["transformers.processing_utils", "transformers.models", "transformers.utils"])
def test_a_release_that_is_laid_out_in_another_way_is_imported_by_its_own_code(name: str) -> None:
    script = f"""
import importlib.util, sys
from importlib import import_module
from autopar.graph import lean_transformers as lean
class Other(lean._Package):
    def __init__(self, spec):
        if spec.name == {name!r}:
            raise RuntimeError
        super().__init__(spec)
def other(wanted, package=None):
    if wanted == {name!r}:
        raise ImportError(wanted)
    return import_module(wanted, package)
lean._Package, lean.import_module = Other, other
lean.lean_transformers()
import transformers
print(type(transformers) is not Other, transformers.GPT2Config(n_embd=8).n_embd, transformers.ProcessorMixin.__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True 8 ProcessorMixin"
