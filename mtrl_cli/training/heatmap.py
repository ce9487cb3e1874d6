"""Heatmaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Red, white and blue can be distinguished with red-green color blindness.
_COLOURS = np.array([[178, 24, 43], [255, 255, 255], [33, 102, 172]], dtype=np.float64)
_UNKNOWN = (160, 160, 160)
_SMALLEST_CELL, _WIDTH, _MARGIN = 14, 256, 4


def colours(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Map numbers to colors, uint8 `[..., 3]`: red at -1, white at 0, blue at 1, linear between; gray for values that are not finite."""
    place = np.clip(np.where(np.isfinite(values), values, 0), -1, 1)
    channels = [np.interp(place, (-1, 0, 1), anchors) for anchors in _COLOURS.T]
    return np.where(np.isfinite(values)[..., None], np.stack(channels, -1).round(), _UNKNOWN).astype(np.uint8)


def heatmap(values_RC: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.uint8]:
    """Draw a table of numbers from -1 to 1 with a fixed color scale (see `colours`).

    Args:
        values_RC: `[R, C]`; not finite for missing values.
        rows, columns: names. The name of a column is omitted if it is wider than the column.

    Returns:
        uint8 `[height, width, 3]`.
    """
    from PIL import Image, ImageDraw, ImageFont  # required by TensorBoard only

    font = ImageFont.load_default()
    cell = max(_SMALLEST_CELL, _WIDTH // max(values_RC.shape))
    left = _MARGIN + max(int(font.getlength(name)) for name in rows) + _MARGIN
    cells = colours(values_RC).repeat(cell, 0).repeat(cell, 1)
    image = Image.new("RGB", (left + cells.shape[1], _SMALLEST_CELL + cells.shape[0]), "white")
    image.paste(Image.fromarray(cells), (left, _SMALLEST_CELL))
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(rows):
        draw.text((_MARGIN, _SMALLEST_CELL + row * cell + cell // 2), name, "black", font, anchor="lm")
    for column, name in enumerate(columns):
        if font.getlength(name) <= cell:
            draw.text((left + column * cell + cell // 2, _SMALLEST_CELL // 2), name, "black", font, anchor="mm")
    return np.asarray(image)
