"""The page's file: whole in itself, safe with any name, and the command that writes it."""

import json
import re
from pathlib import Path

import pytest
from drawn_page import Drawn

from autopar.cli import main
from autopar.errors import InputError
from autopar.plan.file import load_plan, save_plan
from autopar.viz.page import in_script, page_html

DATA = re.compile(r'<script type="application/json" id="plan-data">(.*?)</script>', re.DOTALL)


def test_the_page_holds_its_data_and_names_no_other_file(drawn: Drawn) -> None:
    text = drawn.page.read_text()
    found = DATA.search(text)
    assert found is not None
    assert json.loads(found.group(1)) == drawn.picture
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"', text)
    assert "default-src 'none'" in text
    assert "/*page." not in text


def test_names_cannot_end_the_script(drawn: Drawn) -> None:
    evil = "</script><script>alert(1)</script><!--\u2028"
    text = page_html({**drawn.picture, "model": evil})
    found = DATA.search(text)
    assert found is not None
    assert json.loads(found.group(1))["model"] == evil
    assert text.count("<script") == drawn.page.read_text().count("<script")
    assert in_script("<") == "\\u003c"


def test_a_picture_of_another_version_is_refused(drawn: Drawn) -> None:
    with pytest.raises(InputError, match="version 0"):
        page_html({**drawn.picture, "version": 0})


def test_a_plan_saved_without_its_picture_needs_its_model(
    drawn: Drawn, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare, page = tmp_path / "bare.json", tmp_path / "bare.html"
    save_plan(load_plan(drawn.plan), bare)
    assert main(["viz", str(bare), "-o", str(page)]) == 2
    assert "--model" in capfd.readouterr().err
    assert not page.exists()
    assert main(["viz", str(bare), "-o", str(page), "--model", str(drawn.model), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["size_bytes"] == len(page.read_bytes())
    assert page.read_text() == drawn.page.read_text()


def test_licences_of_the_libraries_go_along(drawn: Drawn) -> None:
    assert "dagre" in drawn.page.read_text().split("<style>")[0]
