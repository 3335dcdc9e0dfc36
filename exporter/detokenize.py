"""Tokens become text as they come: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text; bytes that are no whole character come out as U+FFFD."""

_CONTEXT = 5
"""Tokens of the prompt decoded before the first new one: decoders treat the begin of a text differently."""
_BROKEN = "\ufffd"


class TextStream:
    """The text of one request, piece by piece."""

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._shown = len(self._ids)  # the text of ids up to here is out
        self._stops = _StopStrings(stop)

    def push(self, token: int) -> tuple[str, bool]:
        """The text that a token completes, and whether a stop string ends it there."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_BROKEN):  # the next token may bring the rest of the character
            return "", False
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return self._stops.push(text)

    def finish(self) -> tuple[str, bool]:
        """What was held back, but for a character that was never completed; and whether a stop string ends it."""
        text, stopped = self._stops.push(self._new_text().rstrip(_BROKEN))
        return (text, True) if stopped else (text + self._stops.held, False)

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]


class _StopStrings:
    """Holds back what may be the begin of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """More text -> the text that is safe to show, and whether a stop string ends it."""
        text = self.held + text
        # The first to be complete counts, so that it does not matter how the text was cut into tokens.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        begins = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        safe = len(text) - max(begins, default=0)
        self.held = text[safe:]
        return text[:safe], False
