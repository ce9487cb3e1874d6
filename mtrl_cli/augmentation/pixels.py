"""Values changed where they are: cut out, made noisy, brighter, blurred.

Bytes of an image stay bytes, rounded and kept within them. Where a byte says only whether something is there (MinAtar), there is nothing
between 0 and 1 to round to: such images become float32.
"""

from __future__ import annotations

import torch

from mtrl_cli.augmentation.base import Augmentation, Observations, per_sample
from mtrl_cli.augmentation.geometry import as_images, with_edges
from mtrl_cli.types import Fraction, NonNegativeFloat

NOISE_TABLE = 2**20
BLUR_RADIUS = 2


def has_levels(observation: torch.Tensor, largest: float) -> bool:
    """Whether an observation is an image of bytes with levels between nothing and the largest."""
    return observation.dtype == torch.uint8 and largest > 1


def cut_out(images: torch.Tensor, top_M: torch.Tensor, left_M: torch.Tensor, rows_M: torch.Tensor, columns_M: torch.Tensor) -> torch.Tensor:
    """Images `[M, F, H, W]` with a box of zeros each, which begins at a row and a column and has so many of them (int64 `[M]` each)."""
    row_H1 = torch.arange(images.shape[-2], device=images.device)[:, None]
    column_W = torch.arange(images.shape[-1], device=images.device)
    top, left, rows, columns = (each[:, None, None, None] for each in (top_M, left_M, rows_M, columns_M))
    within = ((row_H1 >= top) & (row_H1 < top + rows)) & ((column_W >= left) & (column_W < left + columns))
    return images * (~within).to(images.dtype)  # quicker than filling


def with_noise(observation: torch.Tensor, noise: torch.Tensor, largest: int) -> torch.Tensor:
    """The sum, in the dtype of the observation; bytes (noise: int16) stop at 0 and at the largest."""
    if observation.dtype != torch.uint8:
        return observation + noise
    return observation.to(torch.int16).add_(noise).clamp_(0, largest).to(torch.uint8)


def brightened(observation: torch.Tensor, factor: torch.Tensor, largest: float) -> torch.Tensor:
    """The product; bytes are rounded, and stop at the largest."""
    product = observation.float() * factor
    return product.round_().clamp_(0, largest).to(torch.uint8) if has_levels(observation, largest) else product


def blurred(images: torch.Tensor, sigma_M: torch.Tensor, largest: float) -> torch.Tensor:
    """Images `[M, F, H, W]` blurred by Gaussians of 5 by 5 pixels, each with a sigma of its own (float32 `[M]`); edges are repeated."""
    M, F, H, W = images.shape
    distance_T = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    weight_MT = (-0.5 * (distance_T / sigma_M[:, None].clamp_min(1e-3)).square()).exp()
    weight_MT = (weight_MT / weight_MT.sum(1, keepdim=True)).repeat_interleave(F, 0)
    # Each image is a channel of one picture, with kernels of its own: along rows, then along columns.
    mixed = with_edges(images, BLUR_RADIUS).float().view(1, M * F, H + 2 * BLUR_RADIUS, W + 2 * BLUR_RADIUS)
    for kernel in (weight_MT[:, None, None, :], weight_MT[:, None, :, None]):
        mixed = torch.nn.functional.conv2d(mixed, kernel, groups=M * F)
    mixed = mixed.view(M, F, H, W)
    return mixed.round_().to(torch.uint8) if has_levels(images, largest) else mixed


class Cutout(Augmentation):
    """A black box somewhere in the image (Laskin et al. 2020, "RAD": 10 to 30 of 84 pixels each way).

    Args:
        least, most: length of its sides, in parts of the image's; each is drawn by itself.

    Raises:
        ValueError: least is above most.
    """

    capturable = True

    def __init__(self, seen: Observations, *, least: Fraction, most: Fraction):
        super().__init__(seen)
        if least > most:
            raise ValueError(f"augmentation.cutout.least={least:g} is above augmentation.cutout.most={most:g}")
        self._least, self._most = least, most

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        number, (height, width) = observation.shape[0] * observation.shape[1], observation.shape[-2:]
        (top_M, rows_M), (left_M, columns_M) = self._sides(number, height), self._sides(number, width)
        return cut_out(as_images(observation), top_M, left_M, rows_M, columns_M).view_as(observation)

    def _sides(self, number: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where boxes begin, and how long they are."""
        least, most = round(self._least * length), round(self._most * length)
        side_M = least + self.integers((number,), most - least + 1)
        room_M = length - side_M
        return torch.minimum((self.uniform((number,)) * (room_M + 1)).long(), room_M), side_M


class Noise(Augmentation):
    """Gaussian noise, the same in all frames of a stack (for vectors as in Laskin et al. 2020, "RAD", where it is of unit size).

    It is read from a table of a million draws, from a random place on for each sample, as in Salimans et al. 2017 ("Evolution
    strategies"): to draw for each pixel would take longer than a fourth of an update.

    Args:
        std: standard deviation, in parts of the largest value of an image, or in units of a vector's components.
    """

    kinds = ("image", "vector")
    capturable = True

    def __init__(self, seen: Observations, *, std: NonNegativeFloat):
        super().__init__(seen)
        self._numbers = int(torch.Size(seen.frame_shape).numel())
        random = torch.Generator().manual_seed(seen.seed)
        table = torch.randn(NOISE_TABLE + self._numbers, generator=random).to(seen.device) * std
        self._float_table = table * (seen.largest if seen.kind == "image" else 1.0)
        self._byte_table = self._float_table.clamp(-seen.largest, seen.largest).round().to(torch.int16)
        size, *rest = seen.frame_shape
        own = torch.arange(size)[None] < torch.tensor(seen.own_sizes)[:, None]
        self._padded = not bool(own.all())
        self._own = own.view(len(own), 1, 1, size, *(1,) * len(rest)).to(seen.device)

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        levels = has_levels(observation, self.seen.largest)
        table = self._byte_table if levels else self._float_table
        place_M = self.integers((observation.shape[0] * observation.shape[1],), NOISE_TABLE)
        noise = table.as_strided((NOISE_TABLE, self._numbers), (1, 1)).index_select(0, place_M)
        noise = noise.view(*observation.shape[:2], 1, *observation.shape[3:])
        if self._padded:
            noise = noise * self._own
        return with_noise(observation if levels else observation.float(), noise, int(self.seen.largest))


class Intensity(Augmentation):
    """A factor of 1 + scale times a standard Gaussian, cut at 2 either way, for each sample (Kostrikov et al. 2021, "DrQ"; the default is
    that of Schwarzer et al. 2021, "SPR").

    Args:
        scale: how far factors stray from 1.
    """

    capturable = True

    def __init__(self, seen: Observations, *, scale: NonNegativeFloat):
        super().__init__(seen)
        self._scale = scale

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        draw_KB = torch.randn(observation.shape[:2], generator=self._generator, device=observation.device)
        factor_KB = 1 + self._scale * draw_KB.clamp(-2, 2)
        return brightened(observation, per_sample(factor_KB, observation), self.seen.largest)


class Blur(Augmentation):
    """A Gaussian blur of 5 by 5 pixels (Schwarzer et al. 2021, "SPR"), with a sigma for each sample (as Chen et al. 2020, "SimCLR").

    Args:
        low, high: of sigma, in pixels.

    Raises:
        ValueError: low is above high.
    """

    capturable = True

    def __init__(self, seen: Observations, *, low: NonNegativeFloat, high: NonNegativeFloat):
        super().__init__(seen)
        if low > high:
            raise ValueError(f"augmentation.blur.low={low:g} is above augmentation.blur.high={high:g}")
        self._low, self._high = low, high

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        sigma_M = self.uniform((observation.shape[0] * observation.shape[1],), self._low, self._high)
        return blurred(as_images(observation), sigma_M, self.seen.largest).view_as(observation)
