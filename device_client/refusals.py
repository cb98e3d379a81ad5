"""What is told of messages that were refused: printable, and not more than a person reads. Pure.

Anyone who reaches the broker can send rubbish without end, and with it terminal escapes. The first of each kind are
told as they come, then one a minute, with the number of those that were not told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from device_client.events import Action, Note

EVERY_S = 60.0
"""How often one is told of each kind, in the long run."""
AT_ONCE = 8
"""How many of each kind are told before that."""


def printable(text: str, *, length: int) -> str:
    """Text from outside, with everything that a terminal might obey escaped, and cut."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[:length])[:length]


@dataclass
class _Kind:
    """Messages of one kind: how many may be told now, as of when, and how many were not."""

    may_tell: float = AT_ONCE
    at_s: float = 0.0
    untold: int = 0


@dataclass
class Refusals:
    """See the module docstring."""

    _kinds: dict[str, _Kind] = field(default_factory=dict)

    def note(self, kind: str, *, topic: str, reason: str, now_s: float) -> list[Action]:
        """Tell of a refused message, or count it.

        Args:
            kind: of message, one of a few: never taken from the message.
            topic: it came under.
            reason: why it was refused.
            now_s: Unix seconds.
        """
        known = self._kinds.setdefault(kind, _Kind(at_s=now_s))
        regained = abs(now_s - known.at_s) / EVERY_S  # also when the clock was set back
        known.may_tell = min(float(AT_ONCE), known.may_tell + regained)
        known.at_s = now_s
        if known.may_tell < 1:
            known.untold += 1
            return []
        more, known.untold = {"untold": known.untold} if known.untold else {}, 0
        known.may_tell -= 1
        fields = {"topic": printable(topic, length=200), "reason": printable(reason, length=400), **more}
        return [Note("message_refused", fields)]
