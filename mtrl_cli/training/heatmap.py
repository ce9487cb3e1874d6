"""Tables of numbers as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Red, white and blue stay apart for eyes that cannot tell red from green.
_COLOURS = np.array([[178, 24, 43], [255, 255, 255], [33, 102, 172]], dtype=np.float64)
_UNKNOWN = (160, 160, 160)
_SMALLEST_CELL, _WIDTH, _MARGIN = 14, 256, 4


def colours(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A colour per number, uint8 `[..., 3]`: red at -1, white at 0, blue at 1, in proportion between; grey for what is not finite."""
    place = np.clip(np.where(np.isfinite(values), values, 0), -1, 1)
    channels = [np.interp(place, (-1, 0, 1), anchors) for anchors in _COLOURS.T]
    return np.where(np.isfinite(values)[..., None], np.stack(channels, -1).round(), _UNKNOWN).astype(np.uint8)


def heatmap(values_RC: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.uint8]:
    """A table of numbers from -1 to 1 as a picture, whose scale of colours is always the same (see `colours`).

    Args:
        values_RC: `[R, C]`; not finite where there is no value.
        rows, columns: their names; a column's name is left out where it is wider than its cells.

    Returns:
        uint8 `[height, width, 3]`.
    """
    from PIL import Image, ImageDraw, ImageFont  # TensorBoard requires it, and nothing else here does

    font = ImageFont.load_default()
    cell = max(_SMALLEST_CELL, _WIDTH // max(values_RC.shape))
    left = _MARGIN + max(int(font.getlength(name)) for name in rows) + _MARGIN
    cells = colours(values_RC).repeat(cell, 0).repeat(cell, 1)
    picture = Image.new("RGB", (left + cells.shape[1], _SMALLEST_CELL + cells.shape[0]), "white")
    picture.paste(Image.fromarray(cells), (left, _SMALLEST_CELL))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(rows):
        draw.text((_MARGIN, _SMALLEST_CELL + row * cell + cell // 2), name, "black", font, anchor="lm")
    for column, name in enumerate(columns):
        if font.getlength(name) <= cell:
            draw.text((left + column * cell + cell // 2, _SMALLEST_CELL // 2), name, "black", font, anchor="mm")
    return np.asarray(picture)
