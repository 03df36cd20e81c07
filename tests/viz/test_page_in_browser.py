"""The page in a real browser, opened from disk with the network off, clicked through."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
from drawn_page import Drawn
from live_runs import slower_run

from autopar.cli import main
from autopar.cli_sweep import doublings
from autopar.plan.file import load_picture
from autopar.viz.page import page_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@dataclass
class Seen:
    """A page, and what it asked for and complained of."""

    page: object
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(params=["light", "dark"])
def seen(browser, drawn: Drawn, request: pytest.FixtureRequest) -> Iterator[Seen]:
    with opened(browser, drawn.page, request.param) as found:
        yield found


@contextmanager
def opened(browser, path: Path, theme: str) -> Iterator[Seen]:
    """A page from disk with the network off; at the end, that it asked for nothing and complained of nothing."""
    context = browser.new_context(color_scheme=theme, viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    found = Seen(page)
    page.on("request", lambda sent: found.requests.append(sent.url))
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
    page.goto(path.as_uri())
    page.wait_for_selector("main")
    assert page.locator("html").get_attribute("data-theme") == theme
    yield found
    context.close()
    assert found.errors == []
    assert found.requests == [path.as_uri()]


def test_every_part_is_there_and_has_a_table(seen: Seen, drawn: Drawn) -> None:
    page = seen.page
    for part in ("breakdown", "cluster", "timeline", "memory", "model", "baselines", "proof"):
        section = page.locator(f"#{part}")
        assert section.bounding_box()["height"] > 60
        section.get_by_role("button", name="table").click()
        assert section.locator("tbody tr").count() > 0
    devices = sum(node["count"] * len(node["stages"]) for node in drawn.picture["cluster"]["nodes"])
    assert page.locator(".device").count() == devices == 8
    events = sum(len(row["events"]) for row in drawn.picture["timeline"]["rows"])
    assert page.locator("#timeline tbody tr").count() == events


def test_the_timeline_tells_times_zooms_and_follows_a_micro_batch(seen: Seen) -> None:
    page = seen.page
    canvas = page.locator("#timeline canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    shown = [canvas.evaluate("c => c.toDataURL()")]
    at = (box["x"] + 0.5 * box["width"], box["y"] + 30)
    page.mouse.move(*at)
    assert "stage 0" in page.locator(".tip").inner_text()
    page.mouse.wheel(0, 0.5)  # a plain wheel is the page's
    assert canvas.evaluate("c => c.toDataURL()") == shown[0]
    page.mouse.move(*at)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -600)
    page.keyboard.up("Control")
    shown.append(canvas.evaluate("c => c.toDataURL()"))
    page.get_by_role("button", name="whole step").click()
    assert canvas.evaluate("c => c.toDataURL()") == shown[0] != shown[1]
    page.get_by_role("button", name="zoom in").click()
    assert canvas.evaluate("c => c.toDataURL()") != shown[0]
    page.get_by_role("button", name="whole step").click()
    box = canvas.bounding_box()  # the button may have scrolled it
    for share, row in product(range(20, 100, 4), (30, 62)):  # somewhere on the two rows a micro-batch is computed
        page.mouse.click(box["x"] + share / 100 * box["width"], box["y"] + row)
        if "enters at" in page.locator("#timeline").inner_text():
            return
    pytest.fail("no click on the rows found a micro-batch")


def test_a_module_is_found_by_its_name_and_opens_with_its_split(seen: Seen) -> None:
    page = seen.page
    page.get_by_role("searchbox").fill("down_proj")
    page.locator(".hits button").first.click()
    assert page.locator(".op.found").count() == 1
    words = page.locator("#model aside").inner_text()
    assert "down_proj" in words and "forward" in words and "tp" in words
    assert page.locator("#model path.comm").count() > 0
    labels = page.locator("#model text.comm").all_text_contents()
    assert any(label.startswith("\u2193 ") and "\u2192" in label for label in labels)  # forward, and how it lies then
    assert any(label.startswith("\u2191 ") for label in labels)
    page.evaluate("() => new Promise(requestAnimationFrame)")  # the graph has its first scale
    before = page.locator("#model svg").get_attribute("width")
    page.get_by_role("button", name="smaller").click()
    assert float(page.locator("#model svg").get_attribute("width")) < float(before)
    page.get_by_role("searchbox").fill("no such module")
    assert "no module of this name" in page.locator(".hits").inner_text()


def test_the_theme_can_be_changed(seen: Seen) -> None:
    html = seen.page.locator("html")
    before = html.get_attribute("data-theme")
    seen.page.get_by_role("button", name="light / dark").click()
    assert html.get_attribute("data-theme") != before


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_two_plans_are_compared_on_one_scale(browser, drawn: Drawn, theme: str) -> None:
    with opened(browser, drawn.comparison_page, theme) as found:
        page = found.page
        assert "plan.json against other.json" in page.locator("h1").inner_text()
        assert "other.json is" in page.locator("#gains").inner_text()
        for part in ("breakdown", "moved", "cluster", "timeline", "memory"):
            section = page.locator(f"#{part}")
            assert section.bounding_box()["height"] > 60
            section.get_by_role("button", name="table").click()
            assert section.locator("tbody tr").count() > 0
        assert page.locator(".strip i").count() == 2 * 6  # a cell for each of six blocks in each plan
        shown = [load_picture(path)["cluster"]["nodes"] for path in (drawn.plan, drawn.other_plan)]
        assert page.locator(".device").count() == sum(len(node["stages"]) for nodes in shown for node in nodes)
        assert "down_proj" in page.locator("#splits").inner_text()
        page.locator("#breakdown").get_by_role("button", name="table").click()
        widths = [sum(part.bounding_box()["width"] for part in bar.locator("i").all())
                  for bar in page.locator("#breakdown .bar").all()]
        steps = [load_picture(path)["numbers"]["step_time_s"] for path in (drawn.plan, drawn.other_plan)]
        assert widths[0] / widths[1] == pytest.approx(steps[0] / steps[1], rel=0.02)


def test_a_run_lies_under_its_prediction(browser, drawn: Drawn, tmp_path: Path) -> None:
    trace, path = tmp_path / "run.json", tmp_path / "live.html"
    trace.write_text(json.dumps(slower_run(drawn)))
    assert main(["viz", str(drawn.plan), "--live", str(trace), "-o", str(path)]) == 0
    with opened(browser, path, "light") as found:
        section = found.page.locator("#live")
        assert "run.json on cuda" in section.inner_text()
        assert "3.00" in section.locator("tbody tr").last.inner_text()
        canvas = section.locator("canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        found.page.mouse.move(box["x"] + 0.97 * box["width"], box["y"] + 22 + 5)
        assert found.page.locator(".tip").is_hidden()  # the prediction has ended there
        found.page.mouse.move(box["x"] + 0.97 * box["width"], box["y"] + 22 + 32 + 5)
        assert "rank" in found.page.locator(".tip").inner_text() or "stage" in found.page.locator(".tip").inner_text()


def swept(devices: int, batch: int, rate: float | None) -> dict[str, object]:
    fits = rate is not None
    return {"cluster": f"{devices}xT4", "devices": devices, "nodes": 1, "device": "T4", "global_batch": batch,
            "seq_len": 64, "feasible": fits, "reason": "" if fits else "needs <b>17 GiB</b>", "tokens_per_s": rate,
            "tokens_per_s_per_device": rate / devices if rate else None, "step_time_s": 0.1 if fits else None,
            "mfu": 0.4 if fits else None, "memory_share": 0.5 if fits else None, "gap": 0.0, "stages": 1,
            "mesh": "dp_shard 2", "zero": 1, "micro_batch": 1, "num_micro_batches": 4, "recompute": "none",
            "price_per_million_tokens": None}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_sweep_is_plotted(browser, tmp_path: Path, theme: str) -> None:
    rows = [swept(devices, batch, None if (devices, batch) == (1, 16) else 100.0 * devices**0.8 + batch)
            for devices in (1, 2, 4) for batch in (8, 16)]
    path = tmp_path / "sweep.html"
    path.write_text(page_html({"sweep": {"model": "llama", "rows": rows, "doublings": doublings(rows)}}))
    with opened(browser, path, theme) as found:
        page = found.page
        assert page.locator("#plot path.line").count() == 2  # a line for each batch
        assert page.locator("#plot circle[tabindex]").count() == 5
        assert page.locator("#points tbody tr").count() == 6
        assert page.locator("#doublings .gain").count() == 6  # four of devices, two of batch and devices
        assert "needs <b>17 GiB</b>" in page.locator("#points").inner_text()
        page.locator("#plot circle[tabindex]").first.hover()
        assert "tokens/s" in page.locator(".tip").inner_text()
        before = page.locator("#plot svg").inner_html()
        page.get_by_label("show", exact=True).select_option("MFU")
        page.get_by_label("over", exact=True).select_option("global batch")
        assert page.locator("#plot path.line").count() == 3  # a line for each number of devices
        assert page.locator("#plot svg").inner_html() != before
