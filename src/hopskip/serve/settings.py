"""What a server allows, and under which name: set once, at the start."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hopskip.errors import ConfigError, check_choice
from hopskip.serve.queue import Room
from hopskip.text.reasoning import ReasoningFormat
from hopskip.text.tools.formats import ToolFormatName

UnknownParams = Literal["reject", "ignore", "warn"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may ask for. What goes beyond is refused with a 4xx that names the limit."""

    body_bytes: int = 4 * 2**20
    header_bytes: int = 16 * 2**10
    header_seconds: float = 20.0
    """A request must have sent its headers by then: the first from when a connection is made."""
    body_seconds: float = 30.0
    """A request must have sent its body by then."""
    send_seconds: float = 60.0
    """A client that reads nothing of its answer for so long is dropped."""
    num_prompts: int = 64
    num_choices: int = 16
    num_sequences: int = 128
    """Prompts times choices."""
    num_messages: int = 1024
    num_tools: int = 128
    num_stops: int = 16
    stop_chars: int = 256
    num_logprobs: int = 20
    num_prompt_logprobs: int = 2**20
    """Log-probabilities of prompts' tokens, those of best ones counted."""
    num_biases: int = 1024
    grammar_chars: int = 64 * 2**10
    grammar_depth: int = 64
    """Nesting of a JSON schema."""
    grammar_seconds: float = 3.0
    """Processor time to compile a grammar."""
    grammar_bytes: int = 512 * 2**20
    """Memory to compile a grammar (Linux)."""
    num_grammars: int = 256
    """Grammars that may wait to be compiled."""
    num_grammar_workers: int = 2
    """Processes that compile them."""
    stored_bytes: int = 64 * 2**20
    """Responses that are kept for one API key."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How to serve one model.

    Raises:
        ConfigError: a value cannot work.
    """

    model_name: str
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Clients must give one of these; empty serves everybody who can connect."""
    max_queue: int = 256
    """Sequences that may wait for a slot; further ones are refused with 429."""
    max_seqs_per_key: int | None = None
    """Sequences of one API key that are stepped together. None: three quarters, if there are several keys."""
    max_queue_per_key: int | None = None
    """Sequences of one API key that may wait beside those. None: half of `max_queue`, if there are several keys."""
    max_tokens_per_key: int | None = None
    """Tokens that what runs or waits of one API key may have, prompts and texts at their longest. None: four times what
    the cache holds, if there are several keys."""
    max_stored_responses: int = 256
    """Responses of one API key that are kept in memory, to be gone on from; 0 keeps none."""
    allowed_hosts: tuple[str, ...] | None = None
    """Values of the Host header that are answered, so that no web page can reach a server on this machine through a
    name of its own (DNS rebinding). None answers all."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of other origins that may call the API."""
    max_connections: int = 1024
    """Open at one time; what comes then gets 503."""
    max_connections_per_address: int = 256
    """Of them from one address, such as a proxy's."""
    unknown_params: UnknownParams = "reject"
    """What becomes of a request with parameters that this API does not have: it gets a 400 that names what may have
    been meant; or they are ignored, and with `warn` the log says so."""
    tool_format: ToolFormatName = "auto"
    """How the model writes tool calls; `auto` is as its chat template does."""
    reasoning_format: ReasoningFormat = "auto"
    """Between which marks the model thinks: `auto` are those of its chat template; `none` leaves thoughts in the
    text."""
    exit_when_dead: bool = False
    """End the process when the engine has died, so that a supervisor starts it again."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_choice("tool_format", self.tool_format, ToolFormatName)
        check_choice("reasoning_format", self.reasoning_format, ReasoningFormat)
        if self.max_queue < 0:
            raise ConfigError(f"max_queue is {self.max_queue}; it must be 0 (nothing waits) or above")
        check_choice("unknown_params", self.unknown_params, UnknownParams)
        if self.max_stored_responses < 0:
            raise ConfigError(f"max_stored_responses is {self.max_stored_responses}; it must be 0 (none) or above")
        for name in ("max_connections", "max_connections_per_address"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, least in ("max_seqs_per_key", 1), ("max_queue_per_key", 0), ("max_tokens_per_key", 1):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
            if value is not None and not self.api_keys:
                raise ConfigError(f"{name}={value} has no effect without API keys; leave it out, or give keys")
        for key in self.api_keys:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    "an API key has fewer than 8 characters, spaces, or others than ASCII; use a longer one"
                )

    def seqs_per_key(self, max_num_seqs: int) -> int:
        """Of an engine that steps so many together."""
        if self.max_seqs_per_key is not None:
            return min(self.max_seqs_per_key, max_num_seqs)
        return max(1, max_num_seqs * 3 // 4) if len(self.api_keys) > 1 else max_num_seqs

    def room_per_key(self, max_num_seqs: int, max_model_len: int) -> Room:
        """What of one API key may run or wait."""
        is_shared = len(self.api_keys) > 1
        queue = self.max_queue // 2 if is_shared else self.max_queue
        tokens: float = 4 * max_num_seqs * max_model_len if is_shared else math.inf
        return Room(
            num_sequences=self.seqs_per_key(max_num_seqs)
            + (queue if self.max_queue_per_key is None else min(self.max_queue_per_key, self.max_queue)),
            num_tokens=tokens if self.max_tokens_per_key is None else self.max_tokens_per_key,
        )


def model_name(model: str | None) -> str:
    """What a model is called if nobody says: a folder's or file's own name (paths of this machine are nobody's
    business), a Hub id as it stands."""
    from hopskip.checkpoint.hub_cache import DEFAULT_MODEL

    return Path(model).resolve().name if model is not None and Path(model).exists() else model or DEFAULT_MODEL


def read_api_keys(file: Path | None) -> tuple[str, ...]:
    """The key in HOPSKIP_API_KEY, and those in a file, one a line.

    Raises:
        ConfigError: the file cannot be read, or has none.
    """
    keys = [os.environ["HOPSKIP_API_KEY"]] if os.environ.get("HOPSKIP_API_KEY") else []
    if file is not None:
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api-key-file {str(file)!r} cannot be read ({error}); give a text file") from None
        if not found:
            raise ConfigError(f"api-key-file {str(file)!r} has no keys; write one a line")
        keys += found
    return tuple(keys)
