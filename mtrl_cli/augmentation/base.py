"""Interface of augmentations, and the pipeline that applies several of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch

from mtrl_cli.machine.saved import Saved
from mtrl_cli.replay.buffers import Batch, Samples

SamplesT = TypeVar("SamplesT", bound=Samples)


@dataclass(frozen=True)
class ObservationSpec:
    """Observations and actions of a run, for the constructor of an augmentation.

    Attributes:
        kind: "image" or "vector".
        frame_shape: padded shape of one frame, `(C, H, W)` or `(D,)`.
        own_sizes: number of channels or components of each task. The rest is padding and stays zero.
        largest: largest value of an image: 255, or 1 for images of binary channels.
        task_names: names of the K tasks.
        actions: names of the actions of each task.
        symmetric: whether each task is unchanged in a mirror.
        device: device of the batches.
        seed: seed of the draws.
    """

    kind: str
    frame_shape: tuple[int, ...]
    own_sizes: tuple[int, ...]
    largest: float
    task_names: tuple[str, ...]
    actions: tuple[tuple[str, ...], ...]
    symmetric: tuple[bool, ...]
    device: torch.device
    seed: int


class Augmentation(Saved):
    """Random changes of observations that keep the meaning of a batch: one draw per sample, applied to all frames of its stack.

    The state and the next state have separate draws (Kostrikov et al. 2021, "DrQ"). Draws come from a generator, which is part of the
    augmentation's state. A subclass implements `augment` or `augment_images`.

    Args:
        spec: observations of the run.

    Attributes:
        kinds: supported kinds of observations.
        capturable: whether CUDA graphs can record a call (`machine/cuda_graphs.py`).

    Raises:
        ValueError: observations of an unsupported kind.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    capturable: ClassVar[bool] = False
    saved = ("_generator",)

    def __init__(self, spec: ObservationSpec):
        if spec.kind not in self.kinds:
            advice = "Use noise or scale" if spec.kind == "vector" else "See `mtrl ls augmentation`"
            name, kind = type(self).__name__, self.kinds[0]
            raise ValueError(f"augmentation: {name} requires {kind} observations, got {spec.kind} observations. {advice}")
        self.spec = spec
        self._generator = torch.Generator(spec.device).manual_seed(spec.seed)

    def __call__(self, batch: SamplesT) -> SamplesT:
        """Augment the observations of a batch. Shapes are kept. Images of bytes with two levels may become float32."""
        augmented = replace(batch, observation=self.augment(batch.observation))
        if isinstance(augmented, Batch):
            augmented.next_observation = self.augment(augmented.next_observation)
        return augmented

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        """Augment observations `[K, B, S, *frame]` (image bytes or float32), with one draw per sample."""
        images = observation.flatten(2, 3).flatten(0, 1)
        return self.augment_images(images).view_as(observation)

    def augment_images(self, images: torch.Tensor) -> torch.Tensor:
        """Augment images `[K * B, S * C, H, W]`, with one draw per sample."""
        raise NotImplementedError

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Draw uniformly from low to high, float32."""
        return torch.rand(shape, generator=self._generator, device=self.spec.device) * (high - low) + low

    def integers(self, shape: tuple[int, ...], count: int) -> torch.Tensor:
        """Draw uniformly from 0 to count - 1, int64."""
        return torch.randint(count, shape, generator=self._generator, device=self.spec.device)


class Pipeline:
    """Augmentations that are applied in order. Without augmentations, a batch does not change.

    With several draws, a batch holds every sample several times, in draw-major order: sample b is at b, B + b, 2 B + b, ...

    Args:
        parts: augmentations by name, in order.
        loss_draws: draws of each observation, with its action; M in DrQ.
        target_draws: draws of each next observation; K in DrQ.
    """

    def __init__(self, parts: Mapping[str, Augmentation] | None = None, *, loss_draws: int = 1, target_draws: int = 1):
        self.parts = dict(parts or {})
        self._loss_draws, self._target_draws = loss_draws, target_draws

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can record a call (`machine/cuda_graphs.py`)."""
        return all(part.capturable for part in self.parts.values())

    def __call__(self, batch: SamplesT) -> SamplesT:
        """Augment a batch: observations and actions become `[K, M * B, ...]`, next observations `[K, K' * B, ...]`."""
        batch = replace(batch)
        if self._loss_draws > 1:
            batch.observation, batch.action = repeated(batch.observation, self._loss_draws), repeated(batch.action, self._loss_draws)
        if self._target_draws > 1 and isinstance(batch, Batch):
            batch.next_observation = repeated(batch.next_observation, self._target_draws)
        for part in self.parts.values():
            batch = part(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def repeated(tensor: torch.Tensor, draws: int) -> torch.Tensor:
    """Repeat samples: `[K, B, ...]` to draw-major `[K, draws * B, ...]`."""
    return tensor.repeat(1, draws, *(1,) * (tensor.dim() - 2))


def per_sample(draw_KB: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
    """Reshape one draw per sample, `[K, B]`, to broadcast with observations `[K, B, S, *frame]`."""
    return draw_KB.view(*draw_KB.shape, *(1,) * (observation.dim() - 2))


def check_range(section: str, **ends: float) -> None:
    """Check that the two ends of a range are in order.

    Raises:
        ValueError: the first end is above the second.
    """
    (low, first), (high, second) = ends.items()
    if first > second:
        raise ValueError(f"augmentation.{section}.{low} must be at most augmentation.{section}.{high}, got {first:g} and {second:g}")
