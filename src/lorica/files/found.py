"""What reading an adapter's files gives, in any layout."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.attach.places import Places
from lorica.methods.method import Method, Tensors


@dataclass(frozen=True, eq=False)
class Found:
    """An adapter read from files, ready for `attach_tensors`.

    Attributes:
        method: the settings of the whole adapter.
        places, tensors: by path.
        base_name: the base that it was made for, or None.
        task: Lorica's name of the task, or None.
    """

    method: Method
    places: Places
    tensors: dict[str, Tensors]
    base_name: str | None = None
    task: str | None = None
