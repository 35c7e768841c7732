"""Cells, drawing and layout of a grid of weight combinations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorica.attach.activate import activate
from lorica.base.image_pipeline import ImagePipeline
from lorica.errors import ConfigError
from lorica.tasks.drawing import draw

_SMALLEST_CELL = 96
"""Pixels of a side below which a cell is enlarged, by a whole number, so that it can be seen."""
_GAP, _TEXT = 4, 14
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def numbers_of(text: str) -> list[float]:
    """The numbers of --weights. Raises ConfigError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"--weights {text} holds something that is no number", mend="0,0.5,1")
    return found


def cells_of(names: Sequence[str], weights: Sequence[float]) -> list[dict[str, float]]:
    """The mixture of each cell, row by row: the first adapter's weight changes along a row, and
    where there are two, the second's from row to row.
    """
    if len(names) == 1:
        return [{names[0]: weight} for weight in weights]
    across, down = names
    return [{across: x, down: y} for y in weights for x in weights]


def drawn(
    model: ImagePipeline, prompt: str, mixture: dict[str, float], *, seed: int, **how: Any
) -> Any:
    """One cell, by itself: its numbers do not depend on which other cells there are."""
    with activate(model, mixture):
        return draw(model, [prompt], seeds=[seed], **how)[0]


def compose(pictures: Sequence[Any], weights: Sequence[float], labels: Sequence[str]) -> Any:
    """The cells with their weights beside them, and whose they are.

    Args:
        labels: the names of the adapters: across, and down where there are two.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = len(weights)
    rows = len(pictures) // columns
    side = pictures[0].width
    times = max(1, math.ceil(_SMALLEST_CELL / side))
    cell = side * times
    font = ImageFont.load_default(_TEXT)
    left = 12 + max(_width(font, _named(labels[1:], w)) for w in weights) if rows > 1 else _GAP
    left = max(left, _GAP)
    top = 2 * _TEXT + 10
    size = left + columns * (cell + _GAP), top + rows * (cell + _GAP)
    whole = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(whole)
    pen.text((left, 4), labels[0], fill=_INK, font=font)
    for x, weight in enumerate(weights):
        pen.text((left + x * (cell + _GAP), _TEXT + 7), f"{weight:g}", fill=_INK, font=font)
    for y in range(rows):
        if rows > 1:
            at = (6, top + y * (cell + _GAP) + cell // 2 - _TEXT // 2)
            pen.text(at, _named(labels[1:], weights[y]), fill=_INK, font=font)
        for x in range(columns):
            picture = pictures[y * columns + x].convert("RGB")
            large = picture.resize((cell, cell), Image.Resampling.NEAREST)
            whole.paste(large, (left + x * (cell + _GAP), top + y * (cell + _GAP)))
    return whole


def _named(labels: Sequence[str], weight: float) -> str:
    return " ".join([*labels, f"{weight:g}"])


def _width(font: Any, text: str) -> int:
    return math.ceil(font.getlength(text))
