"""The page of a plan: one HTML file that holds its data, its style and its script, and asks nothing of any network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from autopar.errors import InputError
from autopar.viz.picture import VERSION

_ASSETS = files("autopar.viz") / "assets"
_STYLE, _SCRIPT, _DATA, _LICENCES = "/*page.css*/", "/*page.js*/", "/*plan-data*/", "<!--licences-->"


def page_html(data: Mapping[str, Any]) -> str:
    """The whole page for a plan's picture, for {"comparison": ..., "pictures": [of one plan, of the other]}, or for
    {"sweep": ...}.

    Pictures are what `autopar.viz.picture.picture` gives, a comparison is what `autopar.viz.comparison` gives, a sweep
    has "model", "rows" and "doublings".
    """
    for picture in [] if "sweep" in data else data["pictures"] if "comparison" in data else [data]:
        if picture.get("version") != VERSION:
            raise InputError(
                f"the plan's picture has version {picture.get('version')!r}, and this autopar draws version {VERSION}; "
                f"plan again with this version, or give --model"
            )
    page = (_ASSETS / "page.html").read_text(encoding="utf-8")
    for mark, text in (
        (_LICENCES, f"<!--\n{_asset('LICENSES.txt')}-->"), (_STYLE, _asset("page.css")), (_SCRIPT, _asset("page.js")),
        (_DATA, in_script(json.dumps(data, separators=(",", ":"), allow_nan=False))),
    ):
        before, found, after = page.partition(mark)
        assert found, f"page.html has no place for {mark}"
        page = before + text + after
    return page


def in_script(text: str) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or begins a comment."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
