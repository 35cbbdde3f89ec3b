"""The program that pastes documentation notices what does not do what the page says."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pasting
from tests.pasting import Failed, Shell, paste_page, read_blocks, reader_environment

SERVER_CODE = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({status})
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "home").mkdir()
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    with Shell(folder, reader_environment(tmp_path / "home", path), timeout=30) as shell:
        yield shell


def page_of(folder: Path, text: str) -> Path:
    (folder / "page.md").write_text(text.replace("'''", "```"))
    return folder / "page.md"


def paste(tmp_path: Path, shell: Shell, text: str, *, quick: bool = False) -> tuple[list[str], list[str]]:
    """What was reported, and the reasons for what was left out."""
    lines: list[str] = []
    left_out = paste_page(page_of(tmp_path, text), shell, quick=quick, report=lines.append)
    return lines, [reason for _, reason in left_out]


PAGE = """Text.

'''console
$ mkdir one && cd one   # a comment
printed
$ WORD=two
$ cat; test "$(ls -A ~)$WORD" = \\
> two
'''

<!-- paste: exit=3; setup=echo made > file -->
'''console
$ (exit $(wc -l < file)); test $? = 1 && (exit 3)
'''

'''python
print(open("file").read())
'''

<!-- paste: skip=needs a GPU -->
'''console
$ false
'''
<!-- paste: slow -->
'''console
$ true
'''
'''console
$ scripts/demo
'''
"""


def test_a_page_is_pasted_as_it_stands(tmp_path: Path, shell: Shell) -> None:
    """One shell, an empty home, no input; comments, lines that go on, exit codes, files that are said to be there."""
    lines, left_out = paste(tmp_path, shell, PAGE)
    assert [line.rpartition(" (")[0] for line in lines] == [
        "page.md:3: mkdir one && cd one   # a comment",
        "page.md:3: WORD=two",
        'page.md:3: cat; test "$(ls -A ~)$WORD" = \\\ntwo',
        "page.md:12: (exit $(wc -l < file)); test $? = 1 && (exit 3)",
        "page.md:16: python example.py",
        "page.md:25: true",
    ]
    assert left_out == ["needs a GPU", "is for a checkout"]


def test_the_quick_form(tmp_path: Path, shell: Shell) -> None:
    lines, left_out = paste(tmp_path, shell, PAGE, quick=True)
    assert len(lines) == 4
    assert left_out == [
        "runs in the tests (tests/test_readme.py)",
        "needs a GPU",
        "takes too long for the quick form (slow)",
        "is for a checkout",
    ]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("'''console\n$ true\n$ echo why; false\n'''", r"false\nexits with 1 instead of 0:\nwhy"),
        ("<!-- paste: exit=2 -->\n'''console\n$ true\n'''", "exits with 0 instead of 2"),
        ("<!-- paste: setup=false -->\n'''console\n$ true\n'''", "exits with 1"),
        ("'''console\n$ no-such-program\n'''", "exits with 127"),
        ("'''console\n$ exit 0\n'''", "ends the shell"),
        ("'''python\nx = 1\n'''", "page.md:1: the program prints nothing"),
        ("'''python\nprint(1)\nraise ValueError('this')\n'''", "(?s)exits with 1 .*ValueError: this"),
        ("<!-- paste: server -->\n'''console\n$ false\n'''", "does not come to answer"),
    ],
)
def test_what_does_not_work_is_named(block: str, message: str, tmp_path: Path, shell: Shell) -> None:
    with pytest.raises(Failed, match=message):
        paste(tmp_path, shell, block)


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    with (
        Shell(tmp_path, reader_environment(tmp_path, "/usr/bin:/bin"), timeout=0.3) as shell,
        pytest.raises(Failed, match=r"sleep 60\ntakes longer than 0 s:\nfirst"),
    ):
        paste(tmp_path, shell, "'''console\n$ echo first; sleep 60\n'''")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- paste: slowly -->\n'''console\n$ true\n'''", "page.md:2: 'slowly' is no note"),
        ("<!-- paste: slow=yes -->\n'''console\n$ true\n'''", "'slow=yes' is no note"),
        ("<!-- paste: skip -->\n'''console\n$ true\n'''", "'skip' is no note"),
        ("<!-- paste: slow -->\ntext\n'''console\n$ true\n'''", "does not stand right before a block"),
        ("'''console\ntrue\n'''", "page.md:1: a console block without a line"),
    ],
)
def test_notes_are_checked(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_blocks(page_of(tmp_path, text))


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    monkeypatch.setattr(pasting, "SERVER", f"http://127.0.0.1:{port}")
    return port


ASK = "import urllib.request\nprint(urllib.request.urlopen('{server}').status)\n"


@pytest.mark.parametrize("code", [0, 1])
def test_a_server_runs_until_the_end_of_its_page(code: int, port: int, tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "work" / "server.py").write_text(SERVER_CODE.format(code=code, status=200, port=port))
    text = (
        "<!-- paste: server -->\n'''console\n$ python server.py\n'''\n"
        f"'''python\n{ASK.format(server=pasting.SERVER)}'''"
    )
    if code:
        with pytest.raises(Failed, match=r"wait \$pasted_server\nexits with 1"):
            paste(tmp_path, shell, text)
    else:
        assert len(paste(tmp_path, shell, text)[0]) == 2
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))


def test_a_port_in_use_is_told(port: int, tmp_path: Path, shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(Failed, match=r"answers at http.* already"):
        paste(tmp_path, shell, "<!-- paste: server -->\n'''console\n$ true\n'''")


def test_a_reader_has_no_settings_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPSKIP_MODEL", "x")
    monkeypatch.setenv("PYTHONPATH", "x")
    monkeypatch.setenv("PIP_INDEX_URL", "https://packages.example")
    found = reader_environment(tmp_path, "/bin")
    assert found["HOME"] == str(tmp_path)
    assert found["PIP_INDEX_URL"] == "https://packages.example"
    assert not {"HOPSKIP_MODEL", "PYTHONPATH", "HOPSKIP_CACHE"} & found.keys()
