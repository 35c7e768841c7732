"""An output stream whose reader may go away (`| head`, a closed terminal) without stopping the
run.
"""

import contextlib
import io
import os
from typing import IO

# signs of ours that an encoding may lack; a lost minus would be a wrong number
_PLAIN_SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "→": "->",
        "·": "|",
        "★": "*",
        "⚠": "!",
        "✓": "",
        "■": "",
        "✗": "",
        "━": "-",
    }
)


class SurvivingStream(io.TextIOBase):
    """Writes to `stream` until that fails, then to nowhere. `alive` says which."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.alive = True

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if self.alive:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                plain = text.translate(_PLAIN_SIGNS).encode(self.encoding, "replace")
                self._stream.write(plain.decode(self.encoding))
            except (OSError, ValueError):  # ValueError: the file object is closed
                self._die()
        return len(text)

    def flush(self) -> None:
        if self.alive:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._die()

    def _die(self) -> None:
        """Lead standard output to the null device, or the interpreter would fail on its buffer when
        it ends.
        """
        self.alive = False
        with contextlib.suppress(OSError, ValueError, AttributeError):
            descriptor = self._stream.fileno()
            if descriptor in (1, 2):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
