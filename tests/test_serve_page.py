"""The page in a real browser: send, stream, stop, regenerate, exit slider, reload. Skipped without Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving import Brake, Live, live_server, tiny_llm

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    llm = tiny_llm(tmp_path_factory.mktemp("model"))
    llm.engine._eos_token_ids = frozenset()  # a random model may end its text at any moment
    with live_server(llm) as live:
        yield live


@pytest.fixture
def complaints() -> list[str]:
    """Errors of the page, and requests to anywhere else."""
    return []


@pytest.fixture
def page(live: Live, complaints: list[str]) -> Iterator[Any]:
    def is_foreign(url: str) -> bool:
        return not url.startswith((live.url, "data:"))

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 860})
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.extend([message.text] if message.type == "error" else []))
        page.on("request", lambda request: complaints.extend([request.url] if is_foreign(request.url) else []))
        page.goto(live.url)
        page.wait_for_selector("#dot.ok")
        yield page
        browser.close()


def send(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def finished(page: Any) -> None:
    page.wait_for_selector("#send:not(.stop)")


def set_range(page: Any, name: str, value: int) -> None:
    page.eval_on_selector(name, f"n => {{ n.value = {value}; n.dispatchEvent(new Event('input')); }}")


def test_a_conversation(page: Any, live: Live, complaints: list[str]) -> None:
    set_range(page, "#max", 48)
    send(page, "Hello there")
    page.wait_for_selector(".tok", state="attached")  # it streams
    finished(page)
    assert page.evaluate("getComputedStyle(document.body).display") == "grid", "the styles are there"
    answer = page.inner_text(".answer")
    origins = {n.get_attribute("data-o") for n in page.query_selector_all(".tok")}
    assert "target" in origins
    assert origins <= {"early-exit", "ngram", "target", "bonus"}
    assert float(page.inner_text("#rate")) > 0
    assert "48 tokens" in page.inner_text(".facts")

    # a token looked at with the mouse, and with the keyboard
    page.hover(".tok >> nth=5")
    tip = page.inner_text("#tip")
    assert "%" in tip
    assert page.locator("#tip .alt").count() == 5
    page.mouse.move(2, 2)
    page.focus(".answer")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".tok.on").count() == 1
    assert page.is_visible("#tip")

    # greedy and regenerated, from another exit, beside plain decoding: the same text
    set_range(page, "#exit", 1)
    assert page.inner_text("#out-exit") == "1 of 3"
    page.check("#race")
    page.click("text=Regenerate")
    finished(page)
    assert page.locator(".lane-plain .tok").count() == 48
    assert page.inner_text(".answer >> nth=0") == page.inner_text(".answer >> nth=1") == answer
    assert "same text" in page.inner_text("#verdict")

    # kept over a reload
    page.reload()
    page.wait_for_selector("#dot.ok")
    assert page.inner_text(".answer >> nth=0") == answer
    assert page.inner_text("#out-exit") == "1 of 3"
    assert page.is_checked("#race")

    # dark and light
    before = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != before
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert complaints == []
    assert (
        page.evaluate("(() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } })()")
        == "TypeError"
    ), "text cannot become markup"


def test_stopping_and_errors(page: Any, live: Live) -> None:
    brake = Brake(live.server.llm.engine)
    set_range(page, "#max", 500)
    send(page, "Talk for a long time")
    page.wait_for_selector(".tok", state="attached")
    page.keyboard.press("Escape")
    finished(page)
    assert "stopped" in page.inner_text(".facts")
    brake.release()
    with live.client() as client:
        assert client.get("/health").status_code == 200
    page.fill("#system", "x" * 4000)  # more than the context holds
    send(page, "Again")
    finished(page)
    assert "more than the context" in page.inner_text("[role=alert]")
