"""Answers as Markdown in a real browser: what becomes an element, what stays text, what growing text leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import answer_with, chromium, finished, needs_chromium, opened, send
from tests.serving import live_server, tiny_llm

pytestmark = needs_chromium

LANGUAGES = Path(__file__).parent.parent / "src" / "hopskip" / "serve" / "page" / "vendor" / "languages"

WHOLE = """# Title

Some **bold**, *em*, ~~old~~ and `code`:
a second line.

- one
- two
  1. inner

3. three

- [x] done
- [ ] open

| left | right |
|------|------:|
| `a`  | **1** |

> quoted
> twice

---

```python
def f(x):  # a comment
    return f"{x} < 1"
```

See [here](https://example.com/a?b=1&c=2 "title") or https://example.com.
"""
HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1">

[a](javascript:window.hacked=1) [b](data:text/html,x) [c](/v1/models) [d](JaVaScRiPt:1) [e](vbscript:1) <javascript:1>

![picture](https://example.com/p.png) [f](http://example.com/"onmouseover="x) [ok](mailto:a@example.com)

<b>bold?</b> **in <i>tags</i>** &lt;b&gt; &amp;amp; &#60;b&#x3E; &nosuch; &constructor;

```html" onclick="x
<script>window.hacked = 1</script>
```
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    llm = tiny_llm(tmp_path_factory.mktemp("model"), "none")
    with live_server(llm) as live, chromium() as browser:
        clipboard = ["clipboard-read", "clipboard-write"]
        with opened(browser, live.url, expected="TrustedHTML", permissions=clipboard) as page:
            page.evaluate("""async () => {
                const { MarkdownView, closed } = await import("/page/markdown.js");
                window.mended = closed;
                window.fresh = () => {
                    const node = document.createElement("div");
                    node.className = "markdown";
                    document.getElementById("log").replaceChildren(node);
                    window.view = new MarkdownView(node);
                    return window.view;
                };
                window.rendered = (text) => { fresh().update(text, true); return view.node.innerHTML; };
            }""")
            yield page


def elements(page: Any, selector: str) -> list[str]:
    found: list[str] = page.evaluate("s => [...view.node.querySelectorAll(s)].map((n) => n.textContent)", selector)
    return found


def test_what_markdown_becomes(page: Any) -> None:
    page.evaluate("rendered", WHOLE)
    assert elements(page, "h3") == ["Title"], "below the two headings of the page"
    assert elements(page, "strong") == ["bold", "1"]
    assert elements(page, "em") == ["em"]
    assert elements(page, "del") == ["old"]
    assert elements(page, "p > code, td > code") == ["code", "a"]
    assert page.evaluate("view.node.querySelectorAll(':scope > p br').length") == 1
    assert elements(page, "ul > li > ol > li") == ["inner"]
    assert page.evaluate("view.node.querySelector(':scope > ol').start") == 3
    assert elements(page, "li.task") == ["☑ done", "☐ open"]
    assert elements(page, "th") == ["left", "right"]
    assert elements(page, "td.to-right") == ["1"]
    assert elements(page, "blockquote p") == ["quotedtwice"], "with a line break between"
    assert elements(page, "hr") == [""]
    assert page.evaluate("[...view.node.querySelectorAll('a')].map((n) => [n.href, n.target, n.rel])") == [
        ["https://example.com/a?b=1&c=2", "_blank", "noopener noreferrer nofollow"],
        ["https://example.com/", "_blank", "noopener noreferrer nofollow"],
    ]


def test_code_is_coloured_and_copied(page: Any) -> None:
    page.evaluate("rendered", WHOLE)
    page.wait_for_selector(".code .c-keyword")
    code = 'def f(x):  # a comment\n    return f"{x} < 1"'
    assert elements(page, ".code code") == [code], "colours lose nothing"
    assert elements(page, ".c-comment") == ["# a comment"]
    assert elements(page, "figcaption > span") == ["python"]
    assert page.get_attribute(".code pre", "aria-label") == "Code, python"
    page.click(".code button")
    page.wait_for_selector(".code button:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.wait_for_selector(".code button:has-text('Copy'):not(:has-text('Copied'))")
    # pages of plain http have no clipboard
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    page.evaluate(
        "document.execCommand = (name) => { window.copied = [name, document.activeElement.value]; return true; }"
    )
    page.click(".code button")
    page.wait_for_selector(".code button:has-text('Copied')")
    assert page.evaluate("window.copied") == ["copy", code]
    page.evaluate("delete navigator.clipboard; delete document.execCommand")


@pytest.mark.parametrize(
    ("info", "code", "colours"),
    [
        ("js", "const a = 1;", True),
        ("TS title=x", "type A = 1", True),
        ("sh", 'echo "$HOME"', True),
        ("html", "<b class='x'>1</b><script>let a</script>", True),
        ("", "x = 1", False),
        ("klingon", "x = 1", False),
        ("constructor", "x = 1", False),
        ("python", "x = 1\n" * 9_999 + "x = 1", False),  # too long
    ],
)
def test_languages(page: Any, info: str, code: str, colours: bool) -> None:
    page.evaluate("rendered", f"```{info}\n{code}\n```")
    if colours:
        page.wait_for_selector(".code code span", state="attached")
    else:
        page.wait_for_timeout(50)
    assert elements(page, ".code code") == [code]
    assert bool(elements(page, ".code code span")) is colours


def test_every_colour_file_is_there(page: Any) -> None:
    for name in sorted(path.stem for path in LANGUAGES.iterdir()):
        page.evaluate("rendered", f'```{name}\nint x = 1; "s" # -- <a b="c"> let\n+ added\n```')
        page.wait_for_selector(".code code span", state="attached")


def test_nothing_a_model_writes_becomes_markup_or_is_loaded(page: Any) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.evaluate("rendered", HOSTILE)
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None
    names = set(page.evaluate("[...view.node.querySelectorAll('*')].map((n) => n.localName)"))
    assert names <= {"p", "a", "span", "strong", "figure", "figcaption", "button", "pre", "code", "br"}
    attributes = set(page.evaluate("[...view.node.querySelectorAll('*')].flatMap((n) => n.getAttributeNames())"))
    assert attributes <= {"dir", "class", "href", "target", "rel", "title", "type", "tabindex", "role", "aria-label"}
    assert [a.split(":")[0] for a in page.evaluate("[...view.node.querySelectorAll('a')].map((n) => n.href)")] == [
        "https",
        "http",
        "mailto",
    ]
    text = page.evaluate("view.node.textContent")
    assert '<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1">' in text
    assert "a (javascript:window.hacked=1)" in text
    assert "c (/v1/models)" in text
    assert "<b>bold?</b> in <i>tags</i> <b> &amp; <b> &nosuch; &constructor;" in text
    assert [url for url in requests if "example.com" in url] == []
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "img-src data:;" in policy, "not even by mistake could a picture be loaded"
    markup = "(() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } })()"
    assert page.evaluate(markup) == "TypeError", "text cannot become markup"


def test_markdown_within_tags_is_read(page: Any) -> None:
    page.evaluate("rendered", "<div>\n**bold**\n</div>")
    assert elements(page, "strong") == ["bold"]
    assert page.evaluate("view.node.textContent") == "<div>bold</div>"


def test_deep_nesting_stays_readable(page: Any) -> None:
    for deep in ("> " * 5000 + "x", "- " * 3000 + "x", "*" * 5000 + "x", "[" * 3000):
        page.evaluate("rendered", deep)
        assert page.evaluate("view.node.textContent.length") > 0


def test_a_text_that_grows_ends_as_the_whole_one(page: Any) -> None:
    for text in (WHOLE, HOSTILE, "[a]\n\n[a]: https://example.com\n"):
        page.evaluate(
            "(text) => { fresh(); for (let i = 1; i <= text.length; i++) view.update(text.slice(0, i), false); }", text
        )
        page.evaluate("(text) => view.update(text, true)", text)
        page.wait_for_timeout(50)
        grown = page.evaluate("view.node.innerHTML")
        page.evaluate("rendered", text)
        page.wait_for_timeout(50)
        assert grown == page.evaluate("view.node.innerHTML")


def test_blocks_before_the_last_are_left_alone(page: Any) -> None:
    """So a selection, a scrolled line of code, or a link that has the focus stays as it is."""
    assert page.evaluate(
        """(text) => {
            const kept = (before, after, index) => {
                fresh().update(before, false);
                const node = view.node.children[index];
                view.update(after, false);
                return view.node.children[index] === node;
            };
            return [
                kept("one\\n\\ntwo", "one\\n\\ntwo three", 0),
                kept("one\\n\\n```py\\na", "one\\n\\n```py\\na = 1", 1),
                kept("```py\\na", "```py\\na\\n```\\nend", 0),
                kept("one\\n\\ntwo", "one more", 0),
            ];
        }""",
        WHOLE,
    ) == [True, True, True, False]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a **bol", "a **bol**"),
        ("a **bold*", "a **bold**"),
        ("a **bold**", "a **bold**"),
        ("a **", "a "),
        ("an *em", "an *em*"),
        ("2 * 3", "2 * 3"),
        ("a `cod", "a `cod`"),
        ("a `co**de", "a `co**de`"),
        ("* item *em", "* item *em*"),
        ("[text](https://exa", "text"),
        ("![pic](https://exa", "pic"),
        ("[text](https://example.com) and", "[text](https://example.com) and"),
        ("para\n-", "para\n"),
        ("para\n==", "para\n"),
        ("para\n- x", "para\n- x"),
        ("para\n``", "para\n"),
        ("```py\nx = '**'\n``", "```py\nx = '**'\n"),
        ("```py\nx = **k", "```py\nx = **k"),
        ("~~~\n```\n**a", "~~~\n```\n**a"),
        ("```\na\n```\n**b", "```\na\n```\n**b**"),
        ("````\n```\n*b", "````\n```\n*b"),
    ],
)
def test_what_is_open_at_the_end_is_closed(page: Any, text: str, shown: str) -> None:
    assert page.evaluate("mended", text) == shown


def test_thoughts_are_folded(page: Any) -> None:
    answer_with(page, "<think>\n", "Let me **see**.\n", "</think>\n\n", "It is *so*.")
    page.reload()
    page.wait_for_selector("#dot.ok")
    send(page, "Is it?")
    finished(page)
    assert page.inner_text(".thought summary") == "Thoughts"
    assert page.is_hidden(".thought strong")
    assert page.inner_text(".answer > .markdown") == "It is so."
    page.click(".thought summary")
    assert page.inner_text(".thought strong") == "see"
