"""Images moved: shifted, cropped, turned, zoomed. Pixels are looked up, never mixed, and images end where their edges repeat.

M images of F channels (all frames of a stack), `[M, F, H, W]`.
"""

from __future__ import annotations

import torch

from mtrl_cli.augmentation.base import Augmentation, Observations, per_sample
from mtrl_cli.types import Auto, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat

PIXELS_PER_PAD = 21
"""`pad=auto`: DrQ's 4 pixels of 84, and 1 of 10."""

NARROW = 32
"""Images of fewer columns are shifted by looking up pixel by pixel: copies of their short rows would take longer."""


def auto_pad(frame_shape: tuple[int, ...]) -> int:
    """The pixels that `augmentation.shift.pad=auto` means for images of this shape."""
    return max(1, round(min(frame_shape[-2:]) / PIXELS_PER_PAD))


def padded_windows(images: torch.Tensor, top_M: torch.Tensor, left_M: torch.Tensor, pad: int) -> torch.Tensor:
    """A window of each image's own size, out of the image with its edges repeated `pad` times all around.

    Args:
        images: `[M, F, H, W]`, of any dtype.
        top_M, left_M: int64 `[M]`, each from 0 to 2 pad; pad is the image itself.

    Returns:
        `[M, F, H, W]`, a view with a row's length of W + 2 pad.
    """
    M, F, H, W = images.shape
    rows, pitch = H + 2 * pad, W + 2 * pad
    size = F * rows * pitch
    # An image's windows are stretches of memory that begin at one place or another: each is copied as a whole, with what lies beyond
    # its right edge and its end, which is then cut off. Three times as quick as looking up pixel by pixel.
    reach = 2 * pad * (pitch + 1)
    memory = images.new_zeros(M * size + reach)
    with_edges(images, pad, out=memory[: M * size].view(M, F, rows, pitch))
    start_M = torch.arange(M, device=images.device) * size + top_M * pitch + left_M
    stretches = memory.as_strided(((M - 1) * size + reach + 1, size), (1, 1))
    return stretches.index_select(0, start_M).view(M, F, rows, pitch)[:, :, :H, :W]


def shifted(up_M: torch.Tensor, left_M: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where to look for each pixel of an image that is moved up and to the left (int64 `[M]` each): int64 `[M, H * W]`."""
    row_MH = (torch.arange(height, device=up_M.device) + up_M[:, None]).clamp_(0, height - 1)
    column_MW = (torch.arange(width, device=up_M.device) + left_M[:, None]).clamp_(0, width - 1)
    return (row_MH[:, :, None] * width + column_MW[:, None]).flatten(1)


def with_edges(images: torch.Tensor, pad: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Images `[M, F, H, W]` with their edges repeated `pad` times all around, `[M, F, H + 2 pad, W + 2 pad]`."""
    M, F, H, W = images.shape
    if out is None:
        out = images.new_empty(M, F, H + 2 * pad, W + 2 * pad)
    left, right = (images[..., column, None].expand(-1, -1, -1, pad) for column in (0, W - 1))
    out[:, :, pad : pad + H] = torch.cat([left, images, right], -1)
    out[:, :, :pad] = out[:, :, pad : pad + 1]
    out[:, :, pad + H :] = out[:, :, pad + H - 1 : pad + H]
    return out


def looked_up(images: torch.Tensor, index_MP: torch.Tensor) -> torch.Tensor:
    """Pixels from elsewhere in the same image.

    Args:
        images: `[M, F, H, W]`.
        index_MP: int64 `[M, H * W]`, for each pixel the place of the one to show, row times W plus column.
    """
    M, F, H, W = images.shape
    return images.reshape(M, F, H * W).gather(2, index_MP[:, None].expand(-1, F, -1)).view(M, F, H, W)


def turned(cosine_M: torch.Tensor, sine_M: torch.Tensor, zoom_M: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where to look for each pixel of an image that is turned counter-clockwise around its middle, and then enlarged.

    Args:
        cosine_M, sine_M: float32 `[M]`, of the angle.
        zoom_M: float32 `[M]`, above 1 enlarges.

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
    """Where to look for each pixel of a window of so many rows and columns that is brought to the image's size: int64 `[M, H * W]`."""
    row_H = ((2 * torch.arange(height, device=top_M.device) + 1) * rows) // (2 * height)
    column_W = ((2 * torch.arange(width, device=top_M.device) + 1) * columns) // (2 * width)
    return ((top_M[:, None, None] + row_H[:, None]) * width + left_M[:, None, None] + column_W).flatten(1)


def as_images(observation: torch.Tensor) -> torch.Tensor:
    """`[K, B, S, C, H, W]` to `[K * B, S * C, H, W]`."""
    return observation.flatten(2, 3).flatten(0, 1)


class Shift(Augmentation):
    """Up to `pad` pixels each way; edges are repeated (Kostrikov et al. 2021, "DrQ"; Yarats et al. 2022, "DrQ-v2").

    Args:
        pad: pixels. ("auto" is decided before: 4 of 84.)

    Raises:
        ValueError: nothing of a picture would be left.
    """

    capturable = True

    def __init__(self, seen: Observations, *, pad: NonNegativeInt | Auto):
        super().__init__(seen)
        self._pad = auto_pad(seen.frame_shape) if pad == "auto" else int(pad)
        if self._pad >= min(seen.frame_shape[-2:]):
            raise ValueError(
                f"augmentation.shift.pad={pad} leaves nothing of pictures of {min(seen.frame_shape[-2:])} pixels: expected fewer"
            )

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        top_M, left_M = self.integers((2, observation.shape[0] * observation.shape[1]), 2 * self._pad + 1)
        images = as_images(observation)
        if observation.shape[-1] < NARROW:
            index_MP = shifted(top_M - self._pad, left_M - self._pad, *observation.shape[-2:])
            return looked_up(images, index_MP).view_as(observation)
        return padded_windows(images, top_M, left_M, self._pad).view_as(observation)


class Crop(Augmentation):
    """A window of a part of each side, anywhere in the image, enlarged to the image's size (Laskin et al. 2020, "RAD": 84 of 100 pixels).

    Args:
        share: of each side; 1 is the image itself.

    Raises:
        ValueError: the share is 0.
    """

    capturable = True

    def __init__(self, seen: Observations, *, share: Fraction):
        super().__init__(seen)
        if not share:
            raise ValueError("augmentation.crop.share=0: expected a part of the image that is not empty, such as 0.84")
        self._rows, self._columns = (max(1, round(side * share)) for side in seen.frame_shape[-2:])

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        number, (height, width) = observation.shape[0] * observation.shape[1], observation.shape[-2:]
        top_M = self.integers((number,), height - self._rows + 1)
        left_M = self.integers((number,), width - self._columns + 1)
        index_MP = enlarged(top_M, left_M, self._rows, self._columns, height, width)
        return looked_up(as_images(observation), index_MP).view_as(observation)


class Rotate(Augmentation):
    """A turn around the middle, to the nearest pixels; edges are repeated (Kostrikov et al. 2021: 5 degrees).

    Args:
        degrees: at most, either way.
    """

    capturable = True

    def __init__(self, seen: Observations, *, degrees: NonNegativeFloat):
        super().__init__(seen)
        self._radians = degrees * torch.pi / 180

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        angle_M = self.uniform((observation.shape[0] * observation.shape[1],), -self._radians, self._radians)
        index_MP = turned(angle_M.cos(), angle_M.sin(), torch.ones_like(angle_M), *observation.shape[-2:])
        return looked_up(as_images(observation), index_MP).view_as(observation)


class Scale(Augmentation):
    """A factor for each sample: images are zoomed by it around their middle, to the nearest pixels, and edges are repeated; vectors are
    multiplied by it.

    Images as in Schwarzer et al. 2021 ("SPR"), whose affine changes zoom from 0.9 to 1.1; vectors as the random amplitude scaling of
    Laskin et al. 2020 ("RAD").

    Args:
        low, high: of the factor.

    Raises:
        ValueError: low is above high.
    """

    kinds = ("image", "vector")
    capturable = True

    def __init__(self, seen: Observations, *, low: PositiveFloat, high: PositiveFloat):
        super().__init__(seen)
        if low > high:
            raise ValueError(f"augmentation.scale.low={low:g} is above augmentation.scale.high={high:g}")
        self._low, self._high = low, high

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        factor_KB = self.uniform(tuple(observation.shape[:2]), self._low, self._high)
        if self.seen.kind == "vector":
            return observation * per_sample(factor_KB, observation)
        factor_M = factor_KB.flatten()
        index_MP = turned(torch.ones_like(factor_M), torch.zeros_like(factor_M), factor_M, *observation.shape[-2:])
        return looked_up(as_images(observation), index_MP).view_as(observation)
