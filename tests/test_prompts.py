"""Sets of prompts: those that come with the package, and files of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hopskip.bench.perplexity import read_text
from hopskip.errors import ConfigError, PromptError
from hopskip.prompts import PROMPT_SETS, Prompt, load_prompts, mixed_prompts, spread
from hopskip.sampling_params import text_or_file


def test_prompt_sets_are_in_the_package() -> None:
    assert [len(load_prompts(name)) for name in PROMPT_SETS] == [80, 80, 80, 80, 12, 40]
    assert len(load_prompts("mt_bench", 7)) == 7
    assert [p.set for p in mixed_prompts(7)] == [*PROMPT_SETS[:5], *PROMPT_SETS[:2]]
    assert "long" not in {p.set for p in mixed_prompts(300)}, "proofs would take hours"
    assert spread(range(10), 4) == [0, 2, 5, 7]


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a"}, {"turns": ["b", "c"], "question_id": "q"}, {"messages": chat}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert load_prompts(str(file)) == [
        Prompt("own", "1", "a"),
        Prompt("own", "q", "b"),
        Prompt("own", "5", tuple(chat)),
    ]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    """As Windows' editors write it: prompts, texts to measure, schemas."""
    file = tmp_path / "own.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}')
    assert load_prompts(str(file)) == [Prompt("own", "1", "a")]
    assert read_text(file) == text_or_file(f"@{file}") == '{"prompt": "a"}'


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"text": "x"}', '{"turns": []}', '{"messages": [1]}', '{"prompt": 1}']
)
def test_wrong_prompt_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(text)
    with pytest.raises(PromptError, match=r"own\.jsonl"):
        load_prompts(str(file))


def test_prompts_that_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="alpaka"):
        load_prompts("alpaka")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(str(tmp_path))
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(PromptError, match="not UTF-8"):
        load_prompts(str(tmp_path / "x.jsonl"))
