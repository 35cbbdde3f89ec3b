"""What was said, and how much of it the model sees."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from hopskip.errors import PromptError

Message = dict[str, str]
"""`{"role": "user", "content": "..."}`."""


@dataclass(frozen=True)
class Exchange:
    """A message of the user and its answer."""

    message: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message that is ready to be answered."""

    message: str
    earlier: tuple[Exchange, ...]
    """What was said before, all of it."""
    num_dropped: int
    """Exchanges of it, the oldest, that the model does not see."""
    prompt_ids: list[int]
    max_new_tokens: int
    """Most tokens of the answer."""
    fills_context: bool
    """Whether an answer of so many tokens ends with the context."""


class Conversation:
    """Exchanges under a system message, answered in a context of limited size.

    When the context is full, the oldest exchanges are dropped from what the model sees. They stay in `exchanges`, so
    they are saved as well.

    Args:
        encode: token ids of messages, ready for an answer.
        context: most tokens of prompt and answer.
    """

    def __init__(self, encode: Callable[[Seq[Message]], list[int]], context: int, system: str | None = None) -> None:
        self._encode = encode
        self.context = context
        self.system = system
        self.exchanges: list[Exchange] = []
        self.num_dropped = 0
        """See `Turn`."""
        self.unanswered: str | None = None
        """The last message, if it got no answer; it is not among the exchanges."""

    def start(self, exchanges: Seq[Exchange] = ()) -> None:
        """Forget what was said, and go on from these exchanges."""
        self.exchanges = list(exchanges)
        self.num_dropped = 0
        self.unanswered = None

    def set_system(self, text: str | None) -> None:
        """Take another system message for all that follows.

        Raises:
            PromptError: the model's chat template knows no system messages. Nothing is changed then.
        """
        self._encode([*_system(text), {"role": "user", "content": "?"}])
        self.system = text

    def undo(self) -> Exchange | None:
        """Forget the last exchange, and return it."""
        if not self.exchanges:
            return None
        last = self.exchanges.pop()
        self.num_dropped = min(self.num_dropped, len(self.exchanges))
        self.unanswered = None
        return last

    def reserve(self, max_new_tokens: int) -> int:
        """Tokens that an answer must have room for: an eighth of the context, or fewer if it may not get so long."""
        return min(max_new_tokens, max(1, self.context // 8))

    def prepare(self, message: str, max_new_tokens: int, *, again: bool = False) -> Turn:
        """Make a message ready, without the oldest exchanges if they do not fit.

        Args:
            again: it replaces the last exchange.

        Raises:
            PromptError: the message does not fit even alone, or the template refuses it. Nothing is changed.
        """
        earlier = tuple(self.exchanges[:-1] if again else self.exchanges)
        reserve = self.reserve(max_new_tokens)
        num_tokens = 0
        for num_dropped in range(min(self.num_dropped, len(earlier)), len(earlier) + 1):
            messages = [*_system(self.system), *_messages(earlier[num_dropped:]), {"role": "user", "content": message}]
            prompt_ids = self._encode(messages)
            num_tokens = len(prompt_ids)
            room = self.context - num_tokens
            if room >= reserve:
                return Turn(
                    message=message,
                    earlier=earlier,
                    num_dropped=num_dropped,
                    prompt_ids=prompt_ids,
                    max_new_tokens=min(max_new_tokens, room),
                    fills_context=room <= max_new_tokens,
                )
        of_system = " and the system message" if self.system is not None else ""
        raise PromptError(
            f"the message{of_system} alone has {num_tokens} tokens; with {reserve} kept for an answer it does not fit "
            f"the context of {self.context}; send a shorter one"
        )

    def keep(self, turn: Turn, answer: str) -> None:
        """The message was answered: both are part of what was said from now on."""
        self.exchanges = [*turn.earlier, Exchange(turn.message, answer)]
        self.num_dropped = turn.num_dropped
        self.unanswered = None

    @property
    def messages(self) -> list[Message]:
        """All that was said, as a chat template takes it."""
        return [*_system(self.system), *_messages(self.exchanges)]


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]


def _messages(exchanges: Seq[Exchange]) -> list[Message]:
    pairs = ((("user", item.message), ("assistant", item.answer)) for item in exchanges)
    return [{"role": role, "content": content} for pair in pairs for role, content in pair]
