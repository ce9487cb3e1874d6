"""Augmentations that move images: shift, crop, rotate, scale. Pixels are copied, never interpolated, and edges are repeated.

Images are `[M, F, H, W]`: M samples, F channels (all frames of a stack).
"""

from __future__ import annotations

import torch

from mtrl_cli.augmentation.base import Augmentation, ObservationSpec, check_range, per_sample
from mtrl_cli.types import Auto, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat

PIXELS_PER_PAD = 21
"""Image size per pixel of `pad=auto`: 84 gives DrQ's 4 pixels, 10 gives 1."""

NARROW = 32
"""Images with fewer columns are shifted pixel by pixel: copying their short rows is slower."""


def auto_pad(frame_shape: tuple[int, ...]) -> int:
    """Return the number of pixels of `augmentation.shift.pad=auto` for images of a shape."""
    return max(1, round(min(frame_shape[-2:]) / PIXELS_PER_PAD))


def padded_windows(images: torch.Tensor, top_M: torch.Tensor, left_M: torch.Tensor, pad: int) -> torch.Tensor:
    """Cut a window of the image size from each image after padding it with repeated edges.

    Args:
        images: `[M, F, H, W]`, of any dtype.
        top_M, left_M: int64 `[M]`, from 0 to 2 pad; pad gives the image itself.
        pad: pixels of padding on each side.

    Returns:
        `[M, F, H, W]`, a view with row stride W + 2 pad.
    """
    M, F, H, W = images.shape
    rows, pitch = H + 2 * pad, W + 2 * pad
    size = F * rows * pitch
    # The windows of an image are stretches of memory with different starts. Each stretch is copied as a whole, including the pixels right
    # of the window and after its end, which are cut off afterwards. This is three times as fast as copying pixel by pixel.
    reach = 2 * pad * (pitch + 1)
    memory = images.new_zeros(M * size + reach)
    with_edges(images, pad, out=memory[: M * size].view(M, F, rows, pitch))
    start_M = torch.arange(M, device=images.device) * size + top_M * pitch + left_M
    stretches = memory.as_strided(((M - 1) * size + reach + 1, size), (1, 1))
    return stretches.index_select(0, start_M).view(M, F, rows, pitch)[:, :, :H, :W]


def shifted(up_M: torch.Tensor, left_M: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the source index of each pixel for an image moved up and left by int64 `[M]` pixels each: int64 `[M, H * W]`."""
    row_MH = (torch.arange(height, device=up_M.device) + up_M[:, None]).clamp_(0, height - 1)
    column_MW = (torch.arange(width, device=up_M.device) + left_M[:, None]).clamp_(0, width - 1)
    return (row_MH[:, :, None] * width + column_MW[:, None]).flatten(1)


def with_edges(images: torch.Tensor, pad: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Pad images `[M, F, H, W]` with repeated edges: `[M, F, H + 2 pad, W + 2 pad]`."""
    M, F, H, W = images.shape
    if out is None:
        out = images.new_empty(M, F, H + 2 * pad, W + 2 * pad)
    left, right = (images[..., column, None].expand(-1, -1, -1, pad) for column in (0, W - 1))
    out[:, :, pad : pad + H] = torch.cat([left, images, right], -1)
    out[:, :, :pad] = out[:, :, pad : pad + 1]
    out[:, :, pad + H :] = out[:, :, pad + H - 1 : pad + H]
    return out


def looked_up(images: torch.Tensor, index_MP: torch.Tensor) -> torch.Tensor:
    """Copy pixels from other positions of the same image.

    Args:
        images: `[M, F, H, W]`.
        index_MP: int64 `[M, H * W]`, source index of each pixel: row times W plus column.
    """
    M, F, H, W = images.shape
    return images.reshape(M, F, H * W).gather(2, index_MP[:, None].expand(-1, F, -1)).view(M, F, H, W)


def turned(cosine_M: torch.Tensor, sine_M: torch.Tensor, zoom_M: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the source index of each pixel for an image rotated counter-clockwise around its center, then enlarged.

    Args:
        cosine_M, sine_M: float32 `[M]`, of the angle.
        zoom_M: float32 `[M]`, factor on the size.
        height, width: size of the images.

    Returns:
        int64 `[M, H * W]`, the nearest pixels.
    """
    x_W = (torch.arange(width, device=zoom_M.device) - (width - 1) / 2)[None, None]
    y_H1 = (torch.arange(height, device=zoom_M.device) - (height - 1) / 2)[None, :, None]
    cosine, sine = (cosine_M / zoom_M)[:, None, None], (sine_M / zoom_M)[:, None, None]
    column = (cosine * x_W - sine * y_H1).add_((width - 1) / 2).clamp_(0, width - 1).round_()
    row = (sine * x_W + cosine * y_H1).add_((height - 1) / 2).clamp_(0, height - 1).round_()
    return row.mul_(width).add_(column).long().flatten(1)


def enlarged(top_M: torch.Tensor, left_M: torch.Tensor, rows: int, columns: int, height: int, width: int) -> torch.Tensor:
    """Return the source index of each pixel for a window of `rows` by `columns` pixels enlarged to the image size: int64 `[M, H * W]`."""
    row_H = ((2 * torch.arange(height, device=top_M.device) + 1) * rows) // (2 * height)
    column_W = ((2 * torch.arange(width, device=top_M.device) + 1) * columns) // (2 * width)
    return ((top_M[:, None, None] + row_H[:, None]) * width + left_M[:, None, None] + column_W).flatten(1)


class Shift(Augmentation):
    """Shift by up to `pad` pixels in each direction, with repeated edges (Kostrikov et al. 2021, "DrQ"; Yarats et al. 2022, "DrQ-v2").

    Args:
        pad: number of pixels; "auto": 4 for images of 84 pixels.

    Raises:
        ValueError: `pad` is not below the image size.
    """

    capturable = True

    def __init__(self, spec: ObservationSpec, *, pad: NonNegativeInt | Auto):
        super().__init__(spec)
        self._pad = auto_pad(spec.frame_shape) if pad == "auto" else int(pad)
        if self._pad >= min(spec.frame_shape[-2:]):
            raise ValueError(f"augmentation.shift.pad must be below the image size, {min(spec.frame_shape[-2:])}, got {pad}")

    def augment_images(self, images: torch.Tensor) -> torch.Tensor:
        top_M, left_M = self.integers((2, len(images)), 2 * self._pad + 1)
        if images.shape[-1] < NARROW:
            return looked_up(images, shifted(top_M - self._pad, left_M - self._pad, *images.shape[-2:]))
        return padded_windows(images, top_M, left_M, self._pad)


class Crop(Augmentation):
    """Random window, enlarged to the image size (Laskin et al. 2020, "RAD": 84 of 100 pixels).

    Args:
        share: size of the window as a fraction of each side; 1 gives the image itself.

    Raises:
        ValueError: `share` is 0.
    """

    capturable = True

    def __init__(self, spec: ObservationSpec, *, share: Fraction):
        super().__init__(spec)
        if not share:
            raise ValueError("augmentation.crop.share must be above 0, got 0")
        self._rows, self._columns = (max(1, round(side * share)) for side in spec.frame_shape[-2:])

    def augment_images(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        top_M = self.integers((len(images),), height - self._rows + 1)
        left_M = self.integers((len(images),), width - self._columns + 1)
        return looked_up(images, enlarged(top_M, left_M, self._rows, self._columns, height, width))


class Rotate(Augmentation):
    """Rotation around the center, to the nearest pixels, with repeated edges (Kostrikov et al. 2021: 5 degrees).

    Args:
        degrees: largest angle in both directions.
    """

    capturable = True

    def __init__(self, spec: ObservationSpec, *, degrees: NonNegativeFloat):
        super().__init__(spec)
        self._radians = degrees * torch.pi / 180

    def augment_images(self, images: torch.Tensor) -> torch.Tensor:
        angle_M = self.uniform((len(images),), -self._radians, self._radians)
        return looked_up(images, turned(angle_M.cos(), angle_M.sin(), torch.ones_like(angle_M), *images.shape[-2:]))


class Scale(Augmentation):
    """Random factor per sample. Images are zoomed around the center, to the nearest pixels, with repeated edges. Vectors are multiplied.

    Images follow Schwarzer et al. 2021 ("SPR"), whose affine changes zoom from 0.9 to 1.1. Vectors follow the random amplitude scaling of
    Laskin et al. 2020 ("RAD").

    Args:
        low, high: range of the factor.

    Raises:
        ValueError: low is above high.
    """

    kinds = ("image", "vector")
    capturable = True

    def __init__(self, spec: ObservationSpec, *, low: PositiveFloat, high: PositiveFloat):
        super().__init__(spec)
        check_range("scale", low=low, high=high)
        self._range = low, high

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        if self.spec.kind == "image":
            return super().augment(observation)
        return observation * per_sample(self.uniform(tuple(observation.shape[:2]), *self._range), observation)

    def augment_images(self, images: torch.Tensor) -> torch.Tensor:
        factor_M = self.uniform((len(images),), *self._range)
        return looked_up(images, turned(torch.ones_like(factor_M), torch.zeros_like(factor_M), factor_M, *images.shape[-2:]))
