"""What an augmentation is, and several of them as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch

from mtrl_cli.machine import rng
from mtrl_cli.replay.buffers import Batch, Samples

SamplesT = TypeVar("SamplesT", bound=Samples)


@dataclass(frozen=True)
class Observations:
    """What an augmentation must know of a run.

    Attributes:
        kind: "image" or "vector".
        frame_shape: of one frame, padded: `(C, H, W)` or `(D,)`.
        own_sizes: each task's own number of channels, or of components; what is beyond is padding, and stays zero.
        largest: the largest value of an image: 255, or 1 where a byte says only whether something is there.
        task_names: of the K tasks.
        actions: what each task's actions are called.
        symmetric: whether each task looks and plays the same in a mirror.
        device: where batches are.
        seed: of the draws.
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


class Augmentation(ABC):
    """Random changes that leave what a batch says as it was: drawn for each sample, the same for all frames of its stack.

    The state and the next state are changed by draws of their own (Kostrikov et al. 2021, "DrQ"). Draws come from the generator that is
    made here, which is part of the state.

    Args:
        seen: the run's observations.

    Attributes:
        kinds: of observations that it can change.
        capturable: whether it can be recorded once and replayed (`capture.py`).

    Raises:
        ValueError: it cannot change such observations.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    capturable: ClassVar[bool] = False

    def __init__(self, seen: Observations):
        if seen.kind not in self.kinds:
            others = "for these there are noise and scale" if seen.kind == "vector" else "see `mtrl ls augmentation`"
            raise ValueError(f"augmentation: {type(self).__name__} changes {self.kinds[0]}s, and this pack's are {seen.kind}s; {others}")
        self.seen = seen
        self._generator = torch.Generator(seen.device).manual_seed(seen.seed)

    def __call__(self, batch: SamplesT) -> SamplesT:
        """Augment the observations of a batch. Shapes stay the same; bytes may become float32."""
        augmented = replace(batch, observation=self.augment(batch.observation))
        if isinstance(augmented, Batch):
            augmented.next_observation = self.augment(augmented.next_observation)
        return augmented

    @abstractmethod
    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        """Observations `[K, B, S, *frame]` (bytes of images, or float32), each changed by a draw of its own."""

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Draws from low to high, float32."""
        return torch.rand(shape, generator=self._generator, device=self.seen.device) * (high - low) + low

    def integers(self, shape: tuple[int, ...], count: int) -> torch.Tensor:
        """Draws from 0 to count - 1, int64."""
        return torch.randint(count, shape, generator=self._generator, device=self.seen.device)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        rng.restore(self._generator, state["generator"])


class Pipeline:
    """Augmentations one after the other; a batch as it is where there are none.

    With several draws a batch holds every sample as often, draw after draw: sample b at b, B + b, 2 B + b, ...

    Args:
        parts: by name, in the order in which they are applied.
        loss_draws: of each observation, with its action; DrQ's M.
        target_draws: of each next observation; DrQ's K.
    """

    def __init__(self, parts: Mapping[str, Augmentation] | None = None, *, loss_draws: int = 1, target_draws: int = 1):
        self.parts = dict(parts or {})
        self._loss_draws, self._target_draws = loss_draws, target_draws

    @property
    def capturable(self) -> bool:
        """Whether it can be recorded once and replayed (`capture.py`)."""
        return all(part.capturable for part in self.parts.values())

    def __call__(self, batch: SamplesT) -> SamplesT:
        """Augment a batch: observations and actions `[K, M * B, ...]`, next observations `[K, K' * B, ...]`."""
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
    """`[K, B, ...]` to `[K, draws * B, ...]`: several draws of each sample lie draw after draw."""
    return tensor.repeat(1, draws, *(1,) * (tensor.dim() - 2))


def per_sample(draw_KB: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
    """A draw of each sample, `[K, B]`, so that it goes with all that the sample shows, `[K, B, S, *frame]`."""
    return draw_KB.view(*draw_KB.shape, *(1,) * (observation.dim() - 2))
