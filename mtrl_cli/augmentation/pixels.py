"""Augmentations that change pixel values: cutout, noise, intensity, blur.

Image bytes stay bytes: results are rounded and clipped. Images of binary channels (MinAtar) have no levels between 0 and 1, so they become
float32.
"""

from __future__ import annotations

import torch

from mtrl_cli.augmentation.base import Augmentation, ObservationSpec, check_range, per_sample
from mtrl_cli.augmentation.geometry import with_edges
from mtrl_cli.types import Fraction, NonNegativeFloat

NOISE_TABLE = 2**20
BLUR_RADIUS = 2


def has_levels(observation: torch.Tensor, largest: float) -> bool:
    """Return whether an observation is an image of bytes with more than two levels."""
    return observation.dtype == torch.uint8 and largest > 1


def cut_out(images: torch.Tensor, top_M: torch.Tensor, left_M: torch.Tensor, rows_M: torch.Tensor, columns_M: torch.Tensor) -> torch.Tensor:
    """Set a box of each image `[M, F, H, W]` to zero, by its first row and column and its size (int64 `[M]` each)."""
    row_H1 = torch.arange(images.shape[-2], device=images.device)[:, None]
    column_W = torch.arange(images.shape[-1], device=images.device)
    top, left, rows, columns = (each[:, None, None, None] for each in (top_M, left_M, rows_M, columns_M))
    within = ((row_H1 >= top) & (row_H1 < top + rows)) & ((column_W >= left) & (column_W < left + columns))
    return images * (~within).to(images.dtype)  # faster than filling


def with_noise(observation: torch.Tensor, noise: torch.Tensor, largest: int) -> torch.Tensor:
    """Add noise in the dtype of the observation. Bytes (with int16 noise) are clipped to 0 and `largest`."""
    if observation.dtype != torch.uint8:
        return observation + noise
    return observation.to(torch.int16).add_(noise).clamp_(0, largest).to(torch.uint8)


def brightened(observation: torch.Tensor, factor: torch.Tensor, largest: float) -> torch.Tensor:
    """Multiply by a factor. Bytes are rounded and clipped to `largest`."""
    product = observation.float() * factor
    return product.round_().clamp_(0, largest).to(torch.uint8) if has_levels(observation, largest) else product


def blurred(images: torch.Tensor, sigma_M: torch.Tensor, largest: float) -> torch.Tensor:
    """Blur images `[M, F, H, W]` with 5x5 Gaussians, one sigma per image (float32 `[M]`). Edges are repeated."""
    M, F, H, W = images.shape
    distance_T = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    weight_MT = (-0.5 * (distance_T / sigma_M[:, None].clamp_min(1e-3)).square()).exp()
    weight_MT = (weight_MT / weight_MT.sum(1, keepdim=True)).repeat_interleave(F, 0)
    # Grouped convolutions with one kernel per image and channel: along rows, then along columns.
    mixed = with_edges(images, BLUR_RADIUS).float().view(1, M * F, H + 2 * BLUR_RADIUS, W + 2 * BLUR_RADIUS)
    for kernel in (weight_MT[:, None, None, :], weight_MT[:, None, :, None]):
        mixed = torch.nn.functional.conv2d(mixed, kernel, groups=M * F)
    mixed = mixed.view(M, F, H, W)
    return mixed.round_().to(torch.uint8) if has_levels(images, largest) else mixed


class Cutout(Augmentation):
    """Black box at a random position (Laskin et al. 2020, "RAD": 10 to 30 of 84 pixels per side).

    Args:
        least, most: range of the side lengths, as fractions of the image's sides. The two sides have separate draws.

    Raises:
        ValueError: least is above most.
    """

    capturable = True

    def __init__(self, spec: ObservationSpec, *, least: Fraction, most: Fraction):
        super().__init__(spec)
        check_range("cutout", least=least, most=most)
        self._range = least, most

    def augment_images(self, images: torch.Tensor) -> torch.Tensor:
        (top_M, rows_M), (left_M, columns_M) = (self._sides(len(images), length) for length in images.shape[-2:])
        return cut_out(images, top_M, left_M, rows_M, columns_M)

    def _sides(self, number: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw starts and lengths of the boxes along one side."""
        least, most = (round(share * length) for share in self._range)
        side_M = least + self.integers((number,), most - least + 1)
        room_M = length - side_M
        return torch.minimum((self.uniform((number,)) * (room_M + 1)).long(), room_M), side_M


class Noise(Augmentation):
    """Gaussian noise, equal in all frames of a stack (for vectors as in Laskin et al. 2020, "RAD", with a standard deviation of 1).

    Noise is read from a table of a million draws, at a random position for each sample, as in Salimans et al. 2017 ("Evolution
    strategies"). Drawing for each pixel would take more than a quarter of an update.

    Args:
        std: standard deviation, as a fraction of the largest value of an image, or in units of a vector's components.
    """

    kinds = ("image", "vector")
    capturable = True

    def __init__(self, spec: ObservationSpec, *, std: NonNegativeFloat):
        super().__init__(spec)
        self._numbers = int(torch.Size(spec.frame_shape).numel())
        random = torch.Generator().manual_seed(spec.seed)
        table = torch.randn(NOISE_TABLE + self._numbers, generator=random).to(spec.device) * std
        self._float_table = table * (spec.largest if spec.kind == "image" else 1.0)
        self._byte_table = self._float_table.clamp(-spec.largest, spec.largest).round().to(torch.int16)
        size, *rest = spec.frame_shape
        own = torch.arange(size)[None] < torch.tensor(spec.own_sizes)[:, None]
        self._padded = not bool(own.all())
        self._own = own.view(len(own), 1, 1, size, *(1,) * len(rest)).to(spec.device)

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        levels = has_levels(observation, self.spec.largest)
        table = self._byte_table if levels else self._float_table
        place_M = self.integers((observation.shape[0] * observation.shape[1],), NOISE_TABLE)
        noise = table.as_strided((NOISE_TABLE, self._numbers), (1, 1)).index_select(0, place_M)
        noise = noise.view(*observation.shape[:2], 1, *observation.shape[3:])
        if self._padded:
            noise = noise * self._own
        return with_noise(observation if levels else observation.float(), noise, int(self.spec.largest))


class Intensity(Augmentation):
    """Random factor per sample: 1 + scale times a standard Gaussian clipped to 2 (Kostrikov et al. 2021, "DrQ"; the default is that of
    Schwarzer et al. 2021, "SPR").

    Args:
        scale: standard deviation of the factors.
    """

    capturable = True

    def __init__(self, spec: ObservationSpec, *, scale: NonNegativeFloat):
        super().__init__(spec)
        self._scale = scale

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        draw_KB = torch.randn(observation.shape[:2], generator=self._generator, device=observation.device)
        factor_KB = 1 + self._scale * draw_KB.clamp(-2, 2)
        return brightened(observation, per_sample(factor_KB, observation), self.spec.largest)


class Blur(Augmentation):
    """Gaussian blur of 5x5 pixels (Schwarzer et al. 2021, "SPR"), with one sigma per sample (Chen et al. 2020, "SimCLR").

    Args:
        low, high: range of sigma, in pixels.

    Raises:
        ValueError: low is above high.
    """

    capturable = True

    def __init__(self, spec: ObservationSpec, *, low: NonNegativeFloat, high: NonNegativeFloat):
        super().__init__(spec)
        check_range("blur", low=low, high=high)
        self._range = low, high

    def augment_images(self, images: torch.Tensor) -> torch.Tensor:
        return blurred(images, self.uniform((len(images),), *self._range), self.spec.largest)
