"""Stop strings and held-back text, against a search in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hopskip.text.tokenizer import TextStream


class Pieces:
    """Decodes token i to the i-th piece, and keeps the last character back as a decoder does with half a character."""

    def __init__(self, pieces: list[str], tail: str = "") -> None:
        self._pieces, self._tail = pieces, tail

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return self._tail


texts = st.text(alphabet="ab\u00e9", max_size=4)


@given(st.lists(texts, max_size=12), texts, st.lists(texts.filter(bool), max_size=3))
def test_text_ends_before_the_first_stop_string(pieces: list[str], tail: str, stop: list[str]) -> None:
    stream = TextStream(Pieces(pieces, tail), stop)
    stopped_at = None
    for i in range(len(pieces)):
        before = stream.text
        is_stopped = stream.push(i)
        assert stream.text.startswith(before), "text shown is never taken back"
        if is_stopped:
            stopped_at = i
            break
    stream.finish()
    # the first token whose text completes a stop string ends the text, and the earliest beginning cuts it
    whole = ""
    for i, piece in enumerate([*pieces, tail]):
        whole += piece
        if any(s in whole for s in stop):
            assert stopped_at == (i if i < len(pieces) else None)
            assert stream.text == whole[: min(whole.find(s) for s in stop if s in whole)]
            return
    assert stopped_at is None
    assert stream.text == whole


def test_what_is_held_back_comes_with_the_end() -> None:
    stream = TextStream(Pieces(["Hel", "lo E", "N"]), ["END"])
    assert [stream.push(i) for i in range(3)] == [False, False, False]
    assert stream.text == "Hello "
    assert stream.finish() == "EN"
    assert stream.finish() == ""
    assert stream.text == "Hello EN"


@given(st.lists(texts, min_size=1, max_size=12), texts, texts, st.booleans(), st.lists(st.integers(0, 11)))
def test_each_token_is_taken_once_with_its_text(
    pieces: list[str], tail: str, stop: str, has_stop_token: bool, pauses: list[int]
) -> None:
    stream = TextStream(Pieces(pieces, tail), [stop] if stop else [])
    tokens: list[str] = []
    taken: list[tuple[str, str]] = []
    certain: list[str] = []
    for i in range(len(pieces)):
        before = stream.text
        is_stopped = stream.push(i)
        certain.append(stream.text[len(before) :])
        assert stop or certain[-1] == pieces[i], "nothing is held back for no stop string"
        tokens.append(f"token {i}")
        if is_stopped:
            break
        if i in pauses:
            taken += stream.take(tokens, is_finished=False)
            assert taken == list(zip(tokens, certain, strict=True))
            assert stream.take(tokens, is_finished=False) == []
    if has_stop_token:  # an EOS, say: the text never hears of it
        tokens.append("the end")
        certain.append("")
    num_taken = len(taken)
    taken += stream.take(tokens, is_finished=True)
    assert [token for token, _ in taken] == tokens
    assert [piece for _, piece in taken[:-1]] == certain[:-1]
    if num_taken < len(tokens):
        assert "".join(piece for _, piece in taken) == stream.text
    assert stream.take(tokens, is_finished=True) == []
