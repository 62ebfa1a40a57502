"""Text of tokens as they come: never half a character, nothing of a stop string, and together what all of them decode to."""

import bisect
import codecs
from collections.abc import Sequence
from typing import NamedTuple

from switchmoe.data.vocabulary import Vocabulary


class Piece(NamedTuple):
    """What can be shown now."""

    text: str
    tokens: int  # how many tokens, of those that came, have been shown by now, or begun to be


class TextStream:
    """Text of one answer.

    Args:
      stops: texts at which it ends; they are not shown.
      continues: whether it follows other text (`generation.continues`): a blank that it begins with is shown.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = (), continues: bool = False):
        self._vocabulary, self._stops = vocabulary, tuple(stops)
        self._bytes = {int(token): value for value, token in enumerate(vocabulary.byte_ids)}
        self._continues = continues
        self.ids: list[int] = []
        self.offsets: list[int] = []  # where each token's text begins
        self.text = ""  # what is decoded for good
        self._closed = 0  # how many tokens it is of
        self.stopped = False  # a stop string came
        self._end: int | None = None  # of the text that may be shown at all
        self._shown, self._tokens = 0, 0

    def feed(self, token: int) -> bool:
        """Whether a stop string has come with this token. Nothing comes after it."""
        self.ids.append(token)
        self.offsets.append(len(self.text))
        self._decode(len(self.ids) - self._open_bytes())
        return self.stopped

    def take(self) -> Piece:
        """What can be shown since the last call."""
        end = len(self.text) - self._held() if self._end is None else self._end
        return self._piece(max(end, self._shown))

    def finish(self) -> Piece:
        """The rest; bytes that are no character are shown as replacements."""
        if not self.stopped:
            self._decode(len(self.ids))
        return self._piece(len(self.text) if self._end is None else self._end)

    def _decode(self, count: int) -> None:
        before = len(self.text)
        new = list(filter(self._shows, self.ids[self._closed : count]))
        self._continues = self._continues or before > 0
        self.text += self._vocabulary.continuation(new) if self._continues else self._vocabulary.decode(new)
        if self._continues or self.text:  # blanks before any text may be none
            self._closed = count
        # The stop that is whole first, wherever tokens end; of those that are whole together the longest.
        longest = max(map(len, self._stops), default=0)
        found = [(stop, self.text.find(stop, max(0, before - longest + 1))) for stop in self._stops]
        places = [(place + len(stop), place) for stop, place in found if place >= 0]
        if places:
            self.stopped, self._end = True, min(places)[1]

    def _shows(self, token: int) -> bool:
        """Whether a token is text: pads are none, and an EOS that was to be ignored is no end."""
        return token not in (self._vocabulary.pad_id, self._vocabulary.eos_id)

    def _piece(self, end: int) -> Piece:
        text, self._shown = self.text[self._shown : end], end
        open_ended = self._end is None and end == len(self.text)
        count = len(self.ids) if open_ended else bisect.bisect_left(self.offsets, end)
        self._tokens = max(count, self._tokens)
        return Piece(text, self._tokens)

    def _held(self) -> int:
        """The longest end of the text that a stop string begins with."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
            default=0,
        )

    def _open_bytes(self) -> int:
        """Tokens from the first byte of a character which is not whole yet; those that show nothing may lie between."""
        run: list[tuple[int, int]] = []  # (place from the end, byte)
        for place, token in enumerate(reversed(self.ids), 1):
            if token in self._bytes and len(run) < 4:
                run.insert(0, (place, self._bytes[token]))
            elif self._shows(token):
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(byte for _, byte in run))
        waiting = len(decoder.getstate()[0])
        return run[-waiting][0] if waiting else 0
