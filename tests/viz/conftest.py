"""A model planned twice, and the pages, made once by the commands that users type."""

import json

import pytest
from drawn_page import Drawn

from autopar.cli import main
from autopar.plan.file import load_picture

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    folder = tmp_path_factory.mktemp("page")
    model, plan, page = folder / "config.json", folder / "plan.json", folder / "plan.html"
    model.write_text(json.dumps(CONFIG))
    assert main(["plan", str(model), "--cluster", "2x4xH100-80GB", "--global-batch", "32", "--mesh", "pp=2,tp=2",
                 "-o", str(plan)]) == 0
    assert main(["viz", str(plan), "-o", str(page)]) == 0
    other, compared = folder / "other.json", folder / "compared.html"
    assert main(["plan", str(model), "--cluster", "2x4xH100-80GB", "--global-batch", "32", "--mesh", "pp=1,tp=1,cp=1",
                 "-o", str(other)]) == 0
    assert main(["viz", "--compare", str(plan), str(other), "-o", str(compared)]) == 0
    picture = load_picture(plan)
    assert picture is not None
    return Drawn(model=model, plan=plan, page=page, other_plan=other, comparison_page=compared, picture=picture)
