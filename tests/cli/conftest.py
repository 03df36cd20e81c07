"""Small models on disk, and the command run inside this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autopar.cli import main

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Run:
    """What one command said and returned."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        (line,) = self.out.splitlines()
        value = json.loads(line)
        assert isinstance(value, dict)
        return value


Command = Callable[..., Run]


@pytest.fixture
def autopar(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command with these words and returns what it said."""

    def run(*words: object) -> Run:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Run(code, out, err)

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


@pytest.fixture(scope="session")
def plan_file(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for the small Llama on four H100s."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", str(llama), "--cluster", "4xH100-80GB", "--global-batch", "8", "-o", str(path), "--json"]) == 0
    return path
