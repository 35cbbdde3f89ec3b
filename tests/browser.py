"""The chat page in headless Chromium, as a person uses it. Its tests are skipped where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

CHATS = "**/v1/chat/completions"
WIDE, PHONE = (1360, 860), (360, 740)


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any, url: str, size: tuple[int, int] = WIDE, *, expected: str = "", **options: Any
) -> Iterator[Any]:
    """The page in a profile of its own. Afterwards: it has raised nothing, and asked nobody else for anything.

    Args:
        expected: a part of what the console may complain of.
    """
    complaints: list[str] = []

    def is_foreign(address: str) -> bool:
        return not address.startswith((url, "data:", "blob:"))

    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.extend([message.text] if message.type == "error" else []))
    page.on("request", lambda request: complaints.extend([request.url] if is_foreign(request.url) else []))
    page.goto(url)
    page.wait_for_selector("#dot.ok")
    yield page
    context.close()
    assert [text for text in complaints if not expected or expected not in text] == []


def send(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def finished(page: Any) -> None:
    page.wait_for_selector("#log[aria-busy=false] .assistant:last-child .under")


def set_range(page: Any, name: str, value: float) -> None:
    page.eval_on_selector(name, f"n => {{ n.value = {value}; n.dispatchEvent(new Event('input')); }}")


def answer_with(page: Any, *texts: str, is_whole: bool = True, times: int = 1, **stats: Any) -> list[Any]:
    """Answer the page's next requests in the server's stead, a chunk for each text. Returns the bodies as they come."""
    figures = {"num_tokens": len(texts), "num_drafts": 1, "num_target_passes": 1, "acceptance_rate": 0.5}
    figures |= {"decode_tokens_per_second": 42.0, **stats}
    bodies: list[Any] = []
    events: list[dict[str, Any]] = []
    for text in texts:
        token = {"text": text, "token": text, "origin": "target", "layer": 3, "logprob": None, "top": []}
        events.append({"index": 0, "finish_reason": None, "hopskip": {"tokens": [token], "stats": figures}})
    if is_whole:
        events.append({"index": 0, "finish_reason": "stop", "hopskip": {"tokens": [], "stats": figures}})
    lines = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in events]

    def answer(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        body = ": a comment\n\n" + "".join(lines) + "data: [DONE]\n\n" * is_whole
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route(CHATS, answer, times=times)
    return bodies


def refuse_with(page: Any, status: int, message: str = "", path: str = CHATS) -> None:
    """Refuse the page's next request in the server's stead; status 0 does not answer at all."""

    def refuse(route: Any) -> None:
        if status:
            route.fulfill(status=status, json={"error": {"message": message}} if message else None)
        else:
            route.abort()

    page.route(path, refuse, times=1)
