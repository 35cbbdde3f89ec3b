"""No control of the page without an effect: each changes the request, and is shown only where it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser import CHATS, answer_with, chromium, finished, needs_chromium, opened, send, set_range
from tests.serving import Live, live_server, tiny_llm

PAGE = Path(__file__).parent.parent / "src" / "hopskip" / "serve" / "page"
ALWAYS = {"temperature", "max", "alternatives", "system"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def shown(page: Any) -> set[str]:
    return {n.get_attribute("data-control") for n in page.query_selector_all("[data-control]") if n.is_visible()}


def change(page: Any, name: str) -> None:
    """Move a control to another place than the one it has."""
    node = page.locator(f"#{name}")
    if node.get_attribute("type") == "checkbox":
        node.click()
    elif node.get_attribute("type") == "range":
        low, high, now = (float(node.evaluate(f"n => n.{key}")) for key in ("min", "max", "value"))
        set_range(page, f"#{name}", low if now != low else high)
    else:
        node.fill("Be brief.")


def request(page: Any) -> Any:
    """What the page sends; the server answers it."""
    page.click("#new")
    with page.expect_request(CHATS) as sent:
        send(page, "Hi")
    finished(page)
    assert page.locator(".error").count() == 0, page.inner_text(".error")
    return sent.value.post_data_json


@needs_chromium
@pytest.mark.parametrize(("draft", "controls"), [("both", {"enabled", "k", "exit", "race"}), ("none", set())])
def test_every_control_changes_the_request(folder: Path, browser: Any, draft: str, controls: set[str]) -> None:
    with live_server(tiny_llm(folder, draft)) as live, opened(browser, live.url) as page:
        assert shown(page) == controls | ALWAYS
        assert page.is_visible(".stats") is (draft != "none")
        set_range(page, "#max", 32)  # the next lower is the least
        before = request(page)
        for name in sorted(shown(page) - {"enabled"}):
            change(page, name)
            after = request(page)
            assert after != before, f"{name} has no effect"
            before = after
        assert before["messages"][0] == {"role": "system", "content": "Be brief."}
        if draft != "none":
            assert before["speculative"]["race"] is True
            assert before["speculative"]["num_draft_tokens"] == 1
            page.uncheck("#enabled")
            assert request(page)["speculative"] == {"enabled": False}
            assert shown(page) == {"enabled"} | ALWAYS, "without drafts, nothing of theirs acts"


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    with live_server(tiny_llm(folder)) as live:
        yield live


@pytest.fixture(scope="module")
def page(live: Live, browser: Any) -> Iterator[Any]:
    with opened(browser, live.url) as page:
        yield page


@needs_chromium
@pytest.mark.parametrize(
    ("card", "controls"),
    [
        ({"draft": "early-exit"}, {"enabled", "k", "exit", "race"} | ALWAYS),
        ({"draft": "ngram", "exit_layer": None}, {"enabled", "k", "race"} | ALWAYS),
        ({"draft": "auto", "exit_layer": None}, {"enabled", "k", "race"} | ALWAYS),
        ({"draft": "exit-branch", "exit_layer": None}, {"enabled", "k", "race"} | ALWAYS),
        ({"verify": "reuse"}, {"enabled", "k", "race"} | ALWAYS),
        ({"num_hidden_layers": 2}, {"enabled", "k", "race"} | ALWAYS),
        ({"num_draft_tokens": 1}, {"enabled", "exit", "race"} | ALWAYS),
        ({"max_num_seqs": 1}, {"enabled", "k", "exit"} | ALWAYS),
        ({"has_chat_template": False}, {"enabled", "k", "exit", "race"} | ALWAYS - {"system"}),
        (
            {"recommended_sampling": {"temperature": 0.2, "top_p": 0.9}},
            {"enabled", "k", "exit", "race", "own"} | ALWAYS - {"temperature"},
        ),
    ],
)
def test_controls_follow_what_the_server_says(page: Any, card: Any, controls: set[str]) -> None:
    page.evaluate(
        """async (card) => {
            const { live } = await import("/page/state.js"), { showControls } = await import("/page/controls.js");
            window.served ??= live.card.hopskip;
            live.card = { ...live.card, hopskip: { ...window.served, ...card } };
            showControls();
        }""",
        card,
    )
    assert shown(page) == controls


@needs_chromium
def test_settings_of_the_makers(live: Live, browser: Any) -> None:
    with opened(browser, live.url) as page:
        own = httpx.get(f"{live.url}/v1/models").json()
        own["data"][0]["hopskip"]["recommended_sampling"] = {"temperature": 0.2, "top_p": 0.9}
        page.route("**/v1/models", lambda route: route.fulfill(json=own))
        page.reload()
        page.wait_for_selector("#dot.ok")
        assert "(temperature 0.2, top-p 0.9)" in page.inner_text("[data-control=own]")
        bodies = answer_with(page, "Hi", times=2)
        send(page, "Hi")
        finished(page)
        page.uncheck("#own")
        page.click("#new")
        send(page, "Hi")
        finished(page)
        assert ["temperature" in body for body in bodies] == [False, True]
        assert bodies[1]["temperature"] == 0


# -- files -------------------------------------------------------------------------------------------------------------


def test_every_file_of_the_page_is_served_or_a_licence(live: Live) -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
    with live.client() as client:
        for path in PAGE.rglob("*"):
            name = path.relative_to(PAGE).as_posix()
            if path.is_dir() or path.suffix == ".LICENSE":
                continue
            answer = client.get("/" if name == "index.html" else f"/page/{name}")
            assert answer.status_code == 200, name
            assert answer.headers["content-type"].split(";")[0] == types[path.suffix]
            assert answer.content == path.read_bytes()
            assert "require-trusted-types-for 'script'" in answer.headers["content-security-policy"]
        for name in ("index.html", "none.js", "vendor", "vendor/none.js", "..%2fapp.py", "vendor/marked.LICENSE"):
            assert client.get(f"/page/{name}").status_code == 404, name


def test_what_ships_from_others_has_its_licence() -> None:
    table = (PAGE.parents[3] / "THIRD_PARTY.md").read_text()
    for name, owner in (("marked", "MarkedJS"), ("highlight", "Ivan Sagalaev")):
        assert owner in (PAGE / "vendor" / f"{name}.LICENSE").read_text()
        assert f"vendor/{name}.js" in table
