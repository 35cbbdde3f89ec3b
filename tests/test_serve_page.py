"""The page in a real browser: ask, stop, retry, edit; chats that are kept; errors; keys, phones and languages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import PHONE, answer_with, chromium, finished, needs_chromium, opened, refuse_with, send, set_range
from tests.serving import Brake, Live, live_server, tiny_llm

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    llm = tiny_llm(tmp_path_factory.mktemp("model"))
    llm.engine._eos_token_ids = frozenset()  # a random model may end its text at any moment
    with live_server(llm) as live:
        yield live


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(live: Live, browser: Any) -> Iterator[Any]:
    with opened(browser, live.url) as page:
        set_range(page, "#max", 48)
        yield page


def texts(page: Any, selector: str) -> list[str]:
    return [node.inner_text() for node in page.query_selector_all(selector)]


def titles(page: Any) -> list[str]:
    return texts(page, "#chat-list .open")


# -- a conversation ----------------------------------------------------------------------------------------------------


def test_a_conversation(page: Any) -> None:
    page.click("#view-tokens")
    send(page, "Hello there")
    page.wait_for_selector(".tok", state="attached")  # it streams
    finished(page)
    assert page.evaluate("getComputedStyle(document.body).display") == "grid", "the styles are there"
    answer = page.inner_text(".answer")
    origins = {n.get_attribute("data-o") for n in page.query_selector_all(".tok")}
    assert "target" in origins
    assert origins <= {"early-exit", "ngram", "target", "bonus"}
    assert float(page.inner_text("#rate")) > 0
    assert page.inner_text("#strip-rate") == f"{page.inner_text('#rate')} tokens/s"
    assert float(page.inner_text("#per-pass")) >= 1
    assert "48 tokens" in page.inner_text(".facts")
    assert page.is_hidden("#strip-times"), "nothing has measured or estimated it"

    # a token looked at with the mouse, and with the keyboard
    page.hover(".tok >> nth=5")
    assert page.locator("#tip .alt").count() == 0
    page.mouse.move(2, 2)
    page.focus(".answer")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".tok.on").count() == 1
    assert page.is_visible("#tip")

    # the same tokens as text
    page.click("#view-text")
    assert page.locator(".tok").count() == 0
    assert page.locator(".markdown").count() == 1
    page.click("#view-tokens")

    # greedy and once more, from another exit, with alternatives
    set_range(page, "#exit", 1)
    assert page.inner_text("#out-exit") == "1 of 3"
    page.check("#alternatives")
    page.click("text=Retry")
    finished(page)
    assert page.inner_text(".answer") == answer
    page.hover(".tok >> nth=5")
    assert page.locator("#tip .alt").count() == 5

    # kept over a reload
    page.reload()
    page.wait_for_selector("#dot.ok")
    assert page.inner_text(".answer") == answer
    assert page.inner_text("#out-exit") == "1 of 3"
    assert page.is_checked("#alternatives")

    # dark and light
    before = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != before
    page.click("#new")
    assert page.locator(".turn").count() == 0


def test_a_race(page: Any) -> None:
    page.check("#race")
    page.click("#view-tokens")
    send(page, "Hello there")
    finished(page)
    assert page.locator(".lane-drafted .tok").count() == page.locator(".lane-plain .tok").count() == 48
    assert {n.get_attribute("data-o") for n in page.query_selector_all(".lane-plain .tok")} == {"target"}
    assert re.fullmatch(r"\d+\.\d\d x plain", page.inner_text("#strip-times"))
    assert page.inner_text("#strip-times") in page.inner_text(".facts")
    verdict = page.inner_text("#verdict")
    assert re.match(r"\d+\.\d\d times plain decoding\. The texts are the same\. The two took turns", verdict)
    drafted, plain = float(page.inner_text("#num-spec")), float(page.inner_text("#num-plain"))
    assert drafted / plain == pytest.approx(float(verdict.split()[0]), abs=0.01 + 0.06 / plain * drafted / plain)
    page.reload()
    page.wait_for_selector("#dot.ok")
    assert page.inner_text("#verdict") == verdict


def test_an_estimate_of_the_server_is_said_to_be_one(page: Any) -> None:
    answer_with(page, "Hi", speedup_over_plain=1.84)
    send(page, "Hello")
    finished(page)
    assert page.inner_text("#strip-times") == "about 1.8 x plain"
    assert "estimated" in page.inner_text("#verdict")


def test_stopping(page: Any, live: Live) -> None:
    brake = Brake(live.server.llm.engine)
    page.click("#view-tokens")
    send(page, "Talk for a long time")
    page.wait_for_selector(".tok", state="attached")
    assert page.inner_text("#send") == "Stop"
    assert page.get_attribute("#log", "aria-busy") == "true"
    page.keyboard.press("Escape")
    finished(page)
    assert "stopped" in page.inner_text(".facts")
    assert page.inner_text("#announce") == "Stopped"
    # another chat stops the answer of the one before, and can be used at once
    page.click("text=Retry")
    page.wait_for_selector(".tok", state="attached")
    page.click("#new")
    assert page.inner_text("#send") == "Send"
    brake.release()
    send(page, "And now?")
    finished(page)
    assert titles(page) == ["And now?", "Talk for a long time"]
    with live.client() as client:
        assert client.get("/health").status_code == 200


def test_a_chat_is_deleted_while_its_answer_comes(page: Any, live: Live) -> None:
    brake = Brake(live.server.llm.engine)
    page.click("#view-tokens")
    send(page, "Talk for a long time")
    page.wait_for_selector(".tok", state="attached")
    page.once("dialog", lambda dialog: dialog.accept())
    page.focus("[aria-label^='Delete']")
    page.keyboard.press("Enter")
    brake.release()
    answer_with(page, "Hi")
    send(page, "Hello")
    finished(page)
    assert titles(page) == ["Hello"], "what is deleted does not come back with the end of its answer"


def test_an_earlier_question_is_edited(page: Any) -> None:
    answer_with(page, "one", times=1)
    send(page, "first")
    finished(page)
    answer_with(page, "two")
    send(page, "second")
    finished(page)
    page.focus(".edit >> nth=0")
    page.keyboard.press("Enter")
    assert page.input_value(".editing textarea") == "first"
    page.keyboard.press("Escape")
    assert texts(page, ".user .text") == ["first", "second"], "nothing has happened"
    page.keyboard.press("Enter")  # the button has the focus again
    page.fill(".editing textarea", "another")
    bodies = answer_with(page, "three")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=three")
    finished(page)
    assert texts(page, ".user .text") == ["another"]
    assert texts(page, ".answer") == ["three"]
    assert bodies[0]["messages"] == [{"role": "user", "content": "another"}]


# -- chats that are kept -----------------------------------------------------------------------------------------------


def test_past_chats(page: Any) -> None:
    for question in ("Why is the sky blue?\nIn short.", "x" * 99):
        page.click("#new")
        answer_with(page, f"answer to {question[:3]}")
        send(page, question)
        finished(page)
    assert titles(page) == ["x" * 60 + "…", "Why is the sky blue?"]
    page.click("text=Why is the sky blue? >> nth=0")
    assert texts(page, ".answer") == ["answer to Why"]
    assert page.get_attribute("#chat-list .open >> nth=1", "aria-current") == "true"
    assert page.title() == "Why is the sky blue? – hopskip"  # noqa: RUF001
    page.reload()
    page.wait_for_selector("#dot.ok")
    assert texts(page, ".answer") == ["answer to Why"], "the open one is still open"

    # rename, with keys alone
    page.focus("#chat-list .open >> nth=1")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("Sky")
    page.keyboard.press("Enter")
    assert titles(page)[1] == "Sky"
    page.keyboard.press("Enter")
    page.keyboard.type("Sea")
    page.keyboard.press("Escape")
    assert titles(page)[1] == "Sky"
    answer_with(page, "more")
    send(page, "Go on")
    finished(page)
    assert titles(page) == ["Sky", "x" * 60 + "…"], "a name that was given stays; the latest comes first"

    # delete: no, then yes
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.focus("[aria-label='Delete “Sky”']")
    page.keyboard.press("Enter")
    assert len(titles(page)) == 2
    page.once("dialog", lambda dialog: dialog.accept())
    page.keyboard.press("Enter")
    assert titles(page) == ["x" * 60 + "…"]
    assert page.locator(".turn").count() == 0
    page.reload()
    page.wait_for_selector("#dot.ok")
    assert titles(page) == ["x" * 60 + "…"]
    assert page.evaluate("Object.keys(localStorage).filter((k) => k.startsWith('hopskip.chat.')).length") == 1


def test_what_is_kept_may_be_broken(page: Any) -> None:
    page.evaluate("""() => {
        localStorage["hopskip.settings"] = '{"max": "many", "view": "tokens", "unknown": 1}';
        localStorage["hopskip.chats"] = '[{"id": "a", "title": "Broken", "updated": 1}, null, {"id": 3}]';
        localStorage["hopskip.chat.a"] = '[{"role": "assistant"';
        sessionStorage["hopskip.open"] = "a";
    }""")
    page.reload()
    page.wait_for_selector("#dot.ok")
    assert titles(page) == ["Broken"]
    assert page.locator(".turn").count() == 0
    assert page.inner_text("#out-max") == "512"
    assert page.get_attribute("#view-tokens", "aria-pressed") == "true"


def test_no_room_to_keep_chats(page: Any) -> None:
    answer_with(page, "old")
    send(page, "Old")
    finished(page)
    page.click("#new")
    # room for little: what is only looked at goes, first of this chat, then of the others
    page.evaluate("""() => {
        const set = Storage.prototype.setItem;
        Storage.prototype.setItem = function (name, value) {
            if (value.length > window.room) throw new DOMException("full", "QuotaExceededError");
            set.call(this, name, value);
        };
        window.room = 700;
    }""")
    answer_with(page, *["word "] * 40)
    send(page, "Hello")
    finished(page)
    kept = "JSON.parse(localStorage['hopskip.chat.' + JSON.parse(localStorage['hopskip.chats'])[{}].id])[1]"
    assert page.evaluate(kept.format(0) + ".text") == "word " * 40
    assert page.evaluate(kept.format(0) + ".tokens") == []
    assert page.evaluate(kept.format(1) + ".tokens") == []
    assert page.is_hidden("#notice")
    # none at all: said, and the chat goes on
    page.evaluate("window.room = 0")
    answer_with(page, "still here")
    send(page, "And now?")
    finished(page)
    assert "no room" in page.inner_text("#notice")
    assert texts(page, ".answer")[-1] == "still here"
    page.evaluate("window.room = 1e9")
    answer_with(page, "better")
    send(page, "And now?")
    finished(page)
    assert page.is_hidden("#notice")


def test_a_chat_as_a_file(page: Any) -> None:
    assert page.is_hidden("#export")
    answer_with(page, "It ", "**scatters**.")
    send(page, "Why is the sky blue?")
    finished(page)
    with page.expect_download() as download:
        page.click("#export-markdown")
    assert download.value.suggested_filename == "Why-is-the-sky-blue.md"
    text = Path(download.value.path()).read_text()
    assert text == "# Why is the sky blue?\n\n**You:**\n\nWhy is the sky blue?\n\n**Model:**\n\nIt **scatters**.\n"
    with page.expect_download() as download:
        page.click("#export-json")
    kept = json.loads(Path(download.value.path()).read_text())
    assert [(m["role"], m["content"]) for m in kept["messages"]] == [
        ("user", "Why is the sky blue?"),
        ("assistant", "It **scatters**."),
    ]
    assert kept["messages"][1]["tokens"][0] == {"text": "It ", "origin": "target", "layer": 3}


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_errors_of_the_server(live: Live, browser: Any) -> None:
    with opened(browser, live.url, expected="Failed to load resource") as page:
        page.fill("#system", "x" * 4000)  # more than the context holds
        send(page, "Again")
        finished(page)
        assert "maximum context length is" in page.inner_text("[role=alert]:visible")
        assert texts(page, ".user .text") == ["Again"], "the question is still there"
        for status, message, shown in [
            (503, "shutting down", "The server is not ready: shutting down. Try again"),
            (429, "try later", "could not answer: try later"),
            (502, "", "it answers 502"),
            (0, "", "cannot be reached"),
        ]:
            refuse_with(page, status, message)
            page.click("text=Retry")
            page.wait_for_selector(f".error:has-text('{shown}')")
            finished(page)
        page.fill("#system", "")
        bodies = answer_with(page, "there")
        page.click("text=Retry")
        page.wait_for_selector("text=there")
        finished(page)
        assert page.locator(".error").count() == 0
        assert bodies[0]["messages"] == [{"role": "user", "content": "Again"}]

        # a question that has got no answer is not part of the next one's history
        refuse_with(page, 500, "no")
        send(page, "lost")
        finished(page)
        bodies = answer_with(page, "fine")
        send(page, "next")
        finished(page)
        assert [m["content"] for m in bodies[0]["messages"]] == ["Again", "there", "next"]


def test_a_connection_that_is_lost(page: Any) -> None:
    answer_with(page, "half an ", "answ", is_whole=False)
    send(page, "Go")
    finished(page)
    assert page.inner_text(".answer") == "half an answ"
    assert "connection was lost" in page.inner_text(".error")
    page.wait_for_selector("#dot.ok")
    answer_with(page, "all of it")
    page.click("text=Retry")
    page.wait_for_selector("text=all of it")
    finished(page)
    assert page.locator(".error").count() == 0


def test_a_server_that_wants_a_key(live: Live, browser: Any) -> None:
    with opened(browser, live.url, expected="401") as page:
        set_range(page, "#max", 16)
        refuse_with(page, 401, "a valid API key is needed")
        send(page, "Hello")
        finished(page)
        assert "API key" in page.inner_text(".error")
        assert page.evaluate("document.activeElement.id") == "key"
        refuse_with(page, 401, "a valid API key is needed", "**/v1/models")
        page.keyboard.type("wrong-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#dot.bad")
        page.keyboard.type("right-key")
        with page.expect_request("**/v1/models") as request:
            page.keyboard.press("Enter")
        assert request.value.headers["authorization"] == "Bearer right-key"
        page.wait_for_selector("#dot.ok")
        assert page.is_hidden("#key-form")
        with page.expect_request("**/v1/chat/completions") as request:
            page.click("text=Retry")
        assert request.value.headers["authorization"] == "Bearer right-key"
        finished(page)


# -- keys, phones, languages -------------------------------------------------------------------------------------------


def test_keys_alone(page: Any) -> None:
    answer_with(page, "Hi")
    page.keyboard.type("Hello")  # the message box has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.locator(".turn").count() == 0
    page.keyboard.press("Enter")
    finished(page)
    assert texts(page, ".user .text") == ["Hello\nthere"]
    assert page.inner_text("#announce") == "Answer: Hi", "for who cannot see it"
    page.keyboard.press("Control+Shift+O")
    assert page.locator(".turn").count() == 0
    unnamed = page.evaluate("""[...document.querySelectorAll("button, input, textarea")].filter((n) =>
        !(n.getAttribute("aria-label") || n.textContent.trim() || (n.labels && n.labels.length))
    ).map((n) => n.outerHTML)""")
    assert unnamed == []
    page.keyboard.press("Tab")
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"new", "view-text", "view-tokens", "theme", "input", "enabled", "k", "temperature", "system"} <= seen


def test_an_enter_that_ends_a_composition_sends_nothing(page: Any) -> None:
    page.fill("#input", "にほんご")
    for event in ("{key: 'Enter', isComposing: true}", "{key: 'Enter', keyCode: 229}"):
        page.eval_on_selector(
            "#input", f"n => n.dispatchEvent(new KeyboardEvent('keydown', Object.assign({event}, {{bubbles: true}})))"
        )
    assert page.locator(".turn").count() == 0
    assert page.input_value("#input") == "にほんご"
    answer_with(page, "はい")
    page.keyboard.press("Enter")
    finished(page)
    assert texts(page, ".user .text") == ["にほんご"]


def test_text_from_right_to_left(page: Any) -> None:
    answer_with(page, "# كتاب\n\nمرحبا\n\nand English\n\n- بند\n\n```\ncode\n```\n")  # noqa: RUF001
    send(page, "مرحبا")
    finished(page)
    direction = "(name) => getComputedStyle(document.querySelector(name)).direction"
    names = (".user .text", ".markdown h3", ".markdown p", ".markdown p + p", ".markdown li", ".markdown .code")
    assert [page.evaluate(direction, name) for name in names] == ["rtl", "rtl", "rtl", "ltr", "rtl", "ltr"]
    page.click("#view-tokens")
    assert page.evaluate("getComputedStyle(document.querySelector('.tokens')).direction") == "rtl"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(live: Live, browser: Any, scheme: str) -> None:
    with opened(browser, live.url, PHONE, has_touch=True, is_mobile=True, color_scheme=scheme) as page:
        long = "w" * 400
        wide = "| " + " | ".join(["word" * 10] * 4) + " |"
        answer_with(page, f"{long}\n\n```\n{long}\n```\n\n{wide}\n{'|---' * 4}|\n{wide}\n", speedup_over_plain=1.5)
        send(page, long)
        finished(page)
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        for name in ("#model", "#strip-rate", "#strip-times", "#view-tokens", "#send"):
            box = page.locator(name).bounding_box()
            assert box is not None, name
            assert box["x"] >= 0, name
            assert box["x"] + box["width"] <= PHONE[0], name
            assert box["y"] >= 0, name
            assert box["y"] + box["height"] <= PHONE[1], name
        for view in ("text", "tokens"):
            page.click(f"#view-{view}")
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
            assert page.evaluate("document.getElementById('log').scrollWidth") <= PHONE[0]
        page.click("#view-text")
        for inner in (".code pre", ".table"):
            assert page.eval_on_selector(inner, "n => n.scrollWidth > n.clientWidth"), f"{inner} scrolls inside"
        # lists of chats and of controls open over the chat, and Esc closes them
        for toggle, drawer in (("#chats-toggle", "#new"), ("#panel-toggle", "#temperature")):
            assert page.is_hidden(drawer)
            page.click(toggle)
            page.wait_for_selector(drawer, state="visible")
            assert page.get_attribute(toggle, "aria-expanded") == "true"
            page.keyboard.press("Escape")
            page.wait_for_selector(drawer, state="hidden")
            assert page.get_attribute(toggle, "aria-expanded") == "false"
            assert page.evaluate("'#' + document.activeElement.id") == toggle
