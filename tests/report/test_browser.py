"""The page in a real browser: the slider moves the answers, nothing is asked of a network, nothing goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kilter.report import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed")
    with api.sync_playwright() as play:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
        started = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, make_run: Any) -> Iterator[Any]:
    """The page of a hostile run; on leaving, no error was logged and no request but its own was made."""
    path: Path = write_report(make_run(seeds=2, hostile=True))
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url) if not request.url.startswith("data:,") else None)
    page.goto(path.as_uri())
    yield page
    assert troubles == [path.as_uri()]
    context.close()


def told(page: Any) -> str:
    return page.locator("#kl").get_attribute("aria-valuetext")


def shown(page: Any) -> list[str]:
    return page.locator(".panel:visible h3").all_inner_texts()


def test_the_keyboard_walks_the_points_of_a_method(opened: Any) -> None:
    slider = opened.locator("#kl")
    slider.focus()
    opened.keyboard.press("Home")
    first = told(opened)
    assert first.startswith("PPO without KL, step 0, root KL 0.00")
    answers = opened.locator(".panel:visible .said").all_inner_texts()
    assert len(answers) == 3
    opened.keyboard.press("ArrowRight")
    assert told(opened).startswith("PPO without KL, step 10,")
    opened.keyboard.press("End")
    assert told(opened).startswith("PPO without KL, step 80,")
    assert opened.locator(".panel:visible .said").all_inner_texts() != answers
    assert "truly truly" in opened.locator(".panel:visible .said").first.inner_text()
    opened.keyboard.press("ArrowLeft")
    assert told(opened).startswith("PPO without KL, step 70,")
    assert len(shown(opened)) == 1


def test_a_drag_moves_the_line_in_the_picture(opened: Any) -> None:
    line = opened.locator("svg.picture:visible .cursor").first
    before = float(line.get_attribute("x1"))
    opened.locator("#kl").evaluate("node => { node.value = node.max; node.dispatchEvent(new Event('input')) }")
    after = float(line.get_attribute("x1"))
    assert after > before
    svg = opened.locator("svg.picture:visible").first
    frame, box = svg.bounding_box(), opened.locator("#kl").bounding_box()
    line_x = frame["x"] + after / float(svg.get_attribute("data-width")) * frame["width"]
    opened.locator("#kl").evaluate("node => node.dispatchEvent(new Event('change'))")
    share = float(opened.locator("#kl").input_value()) / float(opened.locator("#kl").get_attribute("max"))
    thumb_x = box["x"] + 11 + share * (box["width"] - 22)
    assert abs(line_x - thumb_x) < 3  # the thumb stands under the line


def test_methods_and_shades_are_chosen(opened: Any) -> None:
    opened.get_by_label("DPO", exact=True).check()
    assert [text.split(" ")[0] for text in shown(opened)] == ["DPO"]
    opened.get_by_label("All", exact=True).check()
    assert len(shown(opened)) == 4
    token = opened.locator(".panel:visible .t[class*=' p']").first
    colour = "node => getComputedStyle(node).backgroundColor"
    assert token.evaluate(colour) != "rgba(0, 0, 0, 0)"
    opened.get_by_label("KL", exact=True).check()
    assert token.evaluate(colour) == "rgba(0, 0, 0, 0)"
    under = opened.locator(".panel:visible .t[class*=' k']").first
    assert "inset" in under.evaluate("node => getComputedStyle(node).boxShadow")
    opened.get_by_label("reward", exact=True).check()
    assert under.evaluate("node => getComputedStyle(node).boxShadow") == "none"


def test_a_click_in_the_picture_moves_the_slider(opened: Any) -> None:
    box = opened.locator("svg.picture:visible").first.bounding_box()
    opened.mouse.click(box["x"] + box["width"] * 0.85, box["y"] + box["height"] / 2)
    assert "truly truly" in opened.locator(".panel:visible .said").first.inner_text()


def test_hostile_text_stays_text(opened: Any) -> None:
    assert opened.evaluate("window.hacked") is None
    assert opened.locator("img").count() == 0
    assert opened.locator("script").count() == 1
    assert opened.locator(".panel .said", has_text="<script>window.hacked=1</script>").count() > 0


@pytest.mark.parametrize("width", [360, 760, 1280])
def test_nothing_is_wider_than_the_window(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.locator("svg.picture:visible").count() == 2


def test_no_labels_of_a_drawing_overlap(opened: Any) -> None:
    boxes = """() => [...document.querySelectorAll('svg.picture, svg.plane, svg.rows, svg.reliability')]
      .flatMap(svg => {
        const texts = [...svg.querySelectorAll('text.label, text.people, text.tick')];
        const all = texts.map(node => [node.textContent, node.getBoundingClientRect()]).filter(([, r]) => r.width);
        const meet = (r, s) => Math.min(r.right, s.right) - Math.max(r.left, s.left) > 1
            && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 3;
        return all.flatMap(([a, r], i) => all.slice(i + 1).filter(([, s]) => meet(r, s)).map(([b]) => a + ' / ' + b));
    })"""
    assert opened.evaluate(boxes) == []
