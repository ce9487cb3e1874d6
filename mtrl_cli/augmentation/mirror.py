"""Images and actions in a mirror."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from mtrl_cli.augmentation.base import Augmentation, Observations, SamplesT
from mtrl_cli.replay.buffers import Batch
from mtrl_cli.types import Fraction

_OTHER = {"LEFT": "RIGHT", "RIGHT": "LEFT"}


def mirrored_name(action: str) -> str:
    """What an action is called in a mirror: UPLEFTFIRE is UPRIGHTFIRE, FIRE is FIRE."""
    return re.sub("LEFT|RIGHT", lambda found: _OTHER[found.group()], action)


def mirrored_actions(actions: Sequence[str]) -> list[int]:
    """For each action of a task the place of its mirror image.

    Raises:
        ValueError: one is not among them; names both.
    """
    for action in actions:
        if mirrored_name(action) not in actions:
            raise ValueError(f"has the action {action} and no {mirrored_name(action)}")
    return [list(actions).index(mirrored_name(action)) for action in actions]


class Flip(Augmentation):
    """The whole transition in a mirror: what was on the left is on the right, in the state and in the next, and so is the action.

    State and next state have one draw, as half a mirrored transition would be none. With several draws of each sample the first of the
    next observations goes with the first of the observations, and so on. Of an n-step window only the first action is learned, so only
    that one is changed; what the rewards were, or a return, does not depend on the side. (Kostrikov et al. 2021 flip images alone.)

    Args:
        probability: that a sample is flipped.

    Raises:
        ValueError: a task is not the same in a mirror, or lacks the mirror image of an action.
    """

    capturable = True

    def __init__(self, seen: Observations, *, probability: Fraction):
        super().__init__(seen)
        self._probability = probability
        _check(seen)
        most = max(len(actions) for actions in seen.actions)
        tables = [mirrored_actions(actions) for actions in seen.actions]
        self._mirrored_KA = torch.tensor([[*table, *range(len(table), most)] for table in tables], device=seen.device)

    def __call__(self, batch: SamplesT) -> SamplesT:
        next_observation = batch.next_observation if isinstance(batch, Batch) else batch.observation
        draws = max(batch.observation.shape[1], next_observation.shape[1])
        flip = self.uniform((batch.observation.shape[0], draws)) < self._probability
        flip_KB = flip[:, : batch.action.shape[1]]
        action = torch.where(flip_KB, self._mirrored_KA.gather(1, batch.action), batch.action)
        flipped = replace(batch, observation=_flipped(batch.observation, flip_KB), action=action)
        if isinstance(flipped, Batch):
            flipped.next_observation = _flipped(next_observation, flip[:, : next_observation.shape[1]])
        return flipped

    def augment(self, observation: torch.Tensor) -> torch.Tensor:
        """The pictures alone, as where they have no actions."""
        return _flipped(observation, self.uniform(tuple(observation.shape[:2])) < self._probability)


def _flipped(observation: torch.Tensor, flip_KB: torch.Tensor) -> torch.Tensor:
    # Each sample is copied from one of two places: three times as quick as choosing pixel by pixel.
    samples = observation.flatten(0, 1)
    place_M = torch.arange(len(samples), device=samples.device) + len(samples) * flip_KB.flatten()
    return torch.cat([samples, samples.flip(-1)]).index_select(0, place_M).view_as(observation)


def _check(seen: Observations) -> None:
    """Refuse what cannot be flipped.

    Raises:
        ValueError: names the first task that cannot, why, and those that can.
    """
    reasons = [_reason(*each) for each in zip(seen.symmetric, seen.actions, strict=True)]
    first = next(((name, reason) for name, reason in zip(seen.task_names, reasons, strict=True) if reason), None)
    if first is not None:
        able = ",".join(name for name, reason in zip(seen.task_names, reasons, strict=True) if not reason)
        others = f"of these tasks such as can be flipped are env.tasks=[{able}]" if able else "none of these tasks can be flipped"
        raise ValueError(f"augmentation=flip: {first[0]} {first[1]}; {others}")


def _reason(symmetric: bool, actions: Sequence[str]) -> str | None:
    if not symmetric:
        return "looks or plays otherwise in a mirror (it is not in env.symmetric)"
    try:
        mirrored_actions(actions)
    except ValueError as error:
        return str(error)
    return None
