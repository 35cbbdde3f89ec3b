"""Text <-> token ids at the edge of the package; the engine speaks ids only.

Tokenizers run on the `tokenizers` library directly: importing transformers' AutoTokenizer costs more than loading the
default model. It is imported only for checkpoints that come with neither `tokenizer.json` nor a byte-level GGUF table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.gguf import GGUFFile
from hopskip.checkpoint.hf_folder import read_json
from hopskip.errors import CheckpointError, PromptError
from hopskip.text.chat_template import ChatTemplate

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_MAX_HELD_TOKENS = 8  # a character has at most 4 bytes; what is incomplete after 8 tokens never becomes one
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")
_ADD_BOS = "tokenizer.ggml.add_bos_token"
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_SPECIAL_KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a checkpoint, with its chat template if it has one."""

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        eos_token_ids: Iterable[int],
    ) -> None:
        self._backend = backend
        self._is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        """Source of the chat template; None if the model has none."""
        self._template = ChatTemplate(chat_template) if chat_template is not None else None
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        """Tokens that end a text: those of the config, else the tokenizer's own and its chat template's."""

    @classmethod
    def load(cls, path: Path, config: ModelConfig) -> Tokenizer:
        """The tokenizer of a Hugging Face folder or a GGUF file.

        Raises:
            CheckpointError: there is none, or it is of a kind that cannot be read.
        """
        return _from_gguf(path, config) if path.is_file() else _from_folder(path, config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens in it count as such.

        Args:
            add_special_tokens: put BOS first where the model's tokenizer does. Text from `render_chat` has it already.

        Raises:
            PromptError: the text cannot be written as UTF-8 (a lone surrogate).
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the prompt is not valid text ({error}); give a string of Unicode characters") from None
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out. Bytes that form no character become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        if REPLACEMENT not in text:
            return text
        # a byte-fallback decoder can spoil the whole run of bytes around a bad one: agree with what a stream shows
        detokenizer = Detokenizer(self)
        return "".join([*map(detokenizer.push, token_ids), detokenizer.flush()])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: those of a whole character, or a part of one."""
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""  # vocabularies may be padded with ids that no token has
        if self._is_byte_level:
            values = [_BYTE_OF_CHAR.get(char) for char in token]
            return token.encode() if None in values else bytes(v for v in values if v is not None)
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    @property
    def has_tools_template(self) -> bool:
        """True if the chat template knows what to do with `tools`."""
        return self._template is not None and "tools" in self._template.variables

    @property
    def backend(self) -> Backend:
        """The tokenizer of the `tokenizers` library."""
        return self._backend

    @property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... as text, as far as the checkpoint names them."""
        return dict(self._special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a chat (messages with `role` and `content`), ready for the assistant's answer.

        `variables` are passed to the template (`tools`, `enable_thinking`, ...); which ones it knows is its own affair.

        Raises:
            PromptError: the model has no chat template, or the template refuses these messages.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text that the chat template makes of these messages, its special tokens written out.

        Raises:
            PromptError: as `apply_chat_template`.
        """
        if self._template is None:
            raise PromptError("this model has no chat template; give a plain prompt, or use an instruct model")
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, **{**self._special_tokens, **variables}
        )


@dataclass
class Detokenizer:
    """Turns a stream of token ids into pieces of valid UTF-8 text; joined, they are `tokenizer.decode` of all the ids.

    A token may end in the middle of a character, and may decode differently at the start of a text. So each piece is
    what the last window of tokens decodes to with the new ones, less what it decoded to without, and is held back as
    long as it ends in an incomplete character (the prefix-offset method of TGI and vLLM).

    >>> detokenizer = Detokenizer(tokenizer)  # doctest: +SKIP
    >>> [detokenizer.push(i) for i in tokenizer.encode("Hi 🙂")] + [detokenizer.flush()]  # doctest: +SKIP
    ['Hi', '', ' 🙂', '']
    """

    tokenizer: Tokenizer
    _window: list[int] = field(default_factory=list)
    _num_read: int = 0
    """Tokens at the start of the window whose text has been given out."""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, possibly empty."""
        self._window.append(token_id)
        piece = self._pending()
        num_held = len(self._window) - self._num_read
        if not piece or (piece.endswith(REPLACEMENT) and num_held < _MAX_HELD_TOKENS):
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return piece

    def flush(self) -> str:
        """The text held back, an incomplete character as U+FFFD. The stream ends here."""
        piece = self._pending()
        self._num_read = len(self._window)
        return piece

    def _pending(self) -> str:
        decode = self.tokenizer._backend.decode
        before: str = decode(self._window[: self._num_read], skip_special_tokens=True)
        after: str = decode(self._window, skip_special_tokens=True)
        return after[len(before) :]


def _from_folder(folder: Path, config: ModelConfig) -> Tokenizer:
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file, "") if settings_file.exists() else {}
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} cannot be read ({error}); download it again") from None
    else:
        backend = _convert(folder)
    backend.no_truncation()
    backend.no_padding()
    special_tokens = _special_tokens(folder, settings)
    own_eos = special_tokens.get("eos_token")
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        chat_template=_chat_template(folder, settings),
        eos_token_ids=config.eos_token_ids or _ids(backend, [own_eos] if own_eos else []),
    )


def _convert(source: Path) -> Backend:
    """A tokenizer that only transformers can build: `tokenizer.model` files, sentencepiece tables in GGUF files."""
    from transformers import AutoTokenizer

    try:
        if source.is_file():
            converted = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
        else:
            converted = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        backend: Backend = converted.backend_tokenizer
    except Exception as error:  # of many kinds: missing files, missing packages, unknown classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{source} has no tokenizer that can be read ({reason}); put the model's tokenizer.json beside its weights"
        ) from None
    return backend


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; written as strings or as objects with a `content`."""
    map_file = folder / "special_tokens_map.json"
    found = {**(read_json(map_file, "") if map_file.exists() else {}), **settings}
    tokens = {}
    for kind in _SPECIAL_KINDS:
        value = found.get(kind)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            tokens[kind] = value
    return tokens


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja` where there is one, as in transformers; else of tokenizer_config.json, the one for chat."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


@dataclass(frozen=True)
class _Split:
    """How a byte-level vocabulary cuts text into words before merging."""

    pattern: str | None = None
    """None: one digit at a time, then GPT-2's own pattern."""
    ignores_merges: bool = False
    """A word that is a token as a whole stays whole, whatever the merges say."""
    adds_bos: bool = False
    """Where the file does not say."""
    normalizer: normalizers.Normalizer | None = None


_LLAMA3 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignores_merges=True,
    adds_bos=True,
)
_QWEN2 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    normalizer=normalizers.NFC(),
)
_SPLITS = {
    "smollm": _Split(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""By `tokenizer.ggml.pre`. A wrong pattern would give wrong ids without a sign of it, so an unknown one is refused."""


def _from_gguf(path: Path, config: ModelConfig) -> Tokenizer:
    metadata = GGUFFile(path).metadata
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise CheckpointError(f"{path} holds no tokenizer; use a complete file, or the model's Hugging Face folder")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        split = _SPLITS.get(str(metadata.get("tokenizer.ggml.pre")))
        if split is None:
            raise CheckpointError(
                f"{path}: pre-tokenizer {metadata.get('tokenizer.ggml.pre')!r} is not supported (those that are: "
                f"{', '.join(_SPLITS)}); use the model's Hugging Face folder"
            )
        try:
            backend = _byte_level_backend(metadata, split)
        except Exception as error:  # the library raises plain Exception; tables may be missing or malformed
            raise CheckpointError(f"{path}: the tokenizer's tables are corrupt ({error}); download it again") from None
    else:
        backend = _convert(path)
    special_tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special_tokens[f"{name}_token"] = tokens[token_id]
    template: Any = metadata.get("tokenizer.chat_template")
    # a GGUF file has no generation_config.json; the chat template tells what ends a turn
    end_of_turn = [token for token in _END_OF_TURN if template and token in template]
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        chat_template=template,
        eos_token_ids=(*config.eos_token_ids, *_ids(backend, end_of_turn)),
    )


def _byte_level_backend(metadata: Mapping[str, Any], split: _Split) -> Backend:
    """The tokenizer that the metadata of a byte-level (`gpt2`) vocabulary describes."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignores_merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None)
    if split.pattern is None:
        words: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    else:
        words = pre_tokenizers.Split(Regex(split.pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    if split.normalizer is not None:
        backend.normalizer = split.normalizer
    backend.decoder = decoders.ByteLevel()
    by_kind = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in by_kind if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in by_kind if k == _USER_DEFINED])
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(bos_id, int) and 0 <= bos_id < len(tokens) and metadata.get(_ADD_BOS, split.adds_bos):
        bos = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    return backend


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet for bytes: printable ones stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _ids(backend: Backend, tokens: Iterable[str]) -> list[int]:
    return [index for index in map(backend.token_to_id, tokens) if index is not None]
