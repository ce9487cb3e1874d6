"""How the scales of tasks' rewards are kept apart. Only the learner sees it: reports show the game's own score.

Which scale goes with which head. Heads of a distribution over fixed returns (`Head.bounded`: c51, hl_gauss) need returns of a known
range, which only some scales see to (`ValueScale.bounds_returns`); `schema.py` refuses the rest by these two attributes.

    none, popart        plain, dueling, quantile
    clip, return_norm   plain, dueling, quantile, c51, hl_gauss
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mtrl_cli.networks.heads import Head
from mtrl_cli.parallel.distributed import ALONE, Ranks
from mtrl_cli.types import Fraction, PositiveFloat


@dataclass(frozen=True)
class RewardStream:
    """What a scale must know of the rewards that it will see.

    Attributes:
        num_tasks, num_envs: K and N; N counts the environments of all ranks.
        gamma: the agent's discount per step.
        device: of the learner.
        ranks: that play these environments; their statistics are one.
    """

    num_tasks: int
    num_envs: int
    gamma: float
    device: torch.device
    ranks: Ranks = ALONE


class ValueScale(ABC):
    """Rewards and values as the learner sees them.

    Attributes:
        bounds_returns: whether it brings returns into a range that is known beforehand.
        follows_targets: whether `follow` has anything to do.
        capturable: whether `rewards` and `follow` can be recorded once and replayed (`capture.py`).
        num_envs: N.
        mean_K, scale_K: float32 `[K]`; the network's values are (value - mean) / scale.
    """

    bounds_returns: ClassVar[bool] = False
    follows_targets: ClassVar[bool] = False
    capturable: ClassVar[bool] = False

    def __init__(self, stream: RewardStream):
        self.num_envs = stream.num_envs
        self.mean_K = torch.zeros(stream.num_tasks, device=stream.device)
        self.scale_K = torch.ones(stream.num_tasks, device=stream.device)

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        """Rewards of one step of this rank's environments (float32), and which episodes ended with it (bool)."""

    @abstractmethod
    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        """Sampled rewards (float32 `[K, B, n]`) on the learner's scale."""

    def follow(self, target_KB: torch.Tensor, seen_KB: torch.Tensor, heads: Sequence[Head]) -> None:
        """Take in an update's targets, once it is made (and the first one's before).

        Args:
            target_KB: float32 `[K, B]`, as the network was given them: (target - mean) / scale.
            seen_KB: bool `[K, B]`, which samples there were.
            heads: the online and the target network's.
        """

    def takes_from(self, other: ValueScale) -> bool:
        """Whether values mean the same here once `take` has the other's statistics."""
        return type(self) is type(other)

    def take(self, other: ValueScale, tasks: Sequence[tuple[int, int]]) -> None:
        """Take another run's statistics of some tasks (their numbers here and there), for heads that were trained with them."""

    def in_rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a network's values are multiplied by and moved by to be values of the game's own rewards, float32 `[K]` each."""
        return self.scale_K, self.mean_K

    def metrics(self) -> dict[str, torch.Tensor]:
        """Its statistics by name, each float `[K]`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""


class NoValueScale(ValueScale):
    """Rewards as they are."""

    capturable = True

    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        return rewards_KBn


class ClipRewards(ValueScale):
    """Rewards clipped to [-limit, limit] (Mnih et al. 2015, Methods). Returns lie within limit / (1 - gamma), in practice far within.

    Args:
        limit: the largest reward that counts in full.
    """

    bounds_returns = True
    capturable = True

    def __init__(self, stream: RewardStream, *, limit: PositiveFloat = 1.0):
        super().__init__(stream)
        self._limit = limit

    def takes_from(self, other: ValueScale) -> bool:
        return isinstance(other, ClipRewards) and other._limit == self._limit

    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        return rewards_KBn.clamp(-self._limit, self._limit)


class PopArt(ValueScale):
    """Targets of each task normalised by their running mean and spread (van Hasselt et al. 2016; per task: Hessel et al. 2019).

    The first and second moments of a task's targets move with every update, and the last layers of both networks with them, so
    that no value changes because of it (proposition 1 there). They move after the update, by the targets that it saw: an
    update's own targets are normalised by the moments before it, where the paper takes the moments that include them. With a small
    step this is the same. Only the very first targets are taken in before they are learned from (`Agent.begin`).

    The spread starts as the root mean square of the first targets, and becomes their standard deviation as more are taken in: the first
    may all but agree, and in units of their own spread the network would at once be very far from all it has to say.

    Args:
        step_size: how far the moments move towards those of an update's targets. The first steps are larger, so that what the
            moments began with does not count. Published: 3e-4, for runs that are hundreds of times
            longer; where values grow faster than the moments follow, the growth is taken for spread.
        min_scale: bound below on the spread.
    """

    follows_targets = True
    capturable = True

    def __init__(self, stream: RewardStream, *, step_size: Fraction = 0.01, min_scale: PositiveFloat = 1e-4):
        super().__init__(stream)
        if not step_size:
            raise ValueError("agent.value_scale.step_size=0 would never see a target: expected a number above 0 and at most 1")
        self._step_size, self._min_scale, self._ranks = step_size, min_scale, stream.ranks
        # In float64: the spread is a small difference of the moments where a task's targets are far from zero.
        self._moments_2K = torch.zeros(2, stream.num_tasks, dtype=torch.float64, device=stream.device)
        self._weight_K = torch.zeros(stream.num_tasks, dtype=torch.float64, device=stream.device)

    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        return rewards_KBn

    def follow(self, target_KB: torch.Tensor, seen_KB: torch.Tensor, heads: Sequence[Head]) -> None:
        mean_K, scale_K = self.mean_K.double(), self.scale_K.double()
        value_KB = self._ranks.joined(target_KB.double() * scale_K[:, None] + mean_K[:, None], 1)
        seen_KB = self._ranks.joined(seen_KB.to(torch.uint8), 1).bool()
        number_K = seen_KB.sum(1)
        of_batch_2K = torch.stack([value_KB, value_KB.square()]).where(seen_KB, 0.0).sum(2) / number_K.clamp_min(1)
        step_K = torch.where(number_K > 0, self._step_size, 0.0).double()
        self._weight_K += step_K * (1 - self._weight_K)
        self._moments_2K.lerp_(of_batch_2K, step_K / self._weight_K.clamp_min(1e-300))
        self._settle()
        factor_K = scale_K / self.scale_K.double()
        offset_K = (mean_K - self.mean_K.double()) / self.scale_K.double()
        for head in heads:
            head.rescale(factor_K.float(), offset_K.float())

    def _settle(self) -> None:
        """Mean and scale as the moments have them; 0 and 1 for a task without any."""
        mean_K, square_K = self._moments_2K
        variance_K = square_K - self._weight_K * mean_K.square()
        scale_K = variance_K.clamp_min(0).sqrt().clamp_min(self._min_scale)
        self.mean_K.copy_(mean_K)
        self.scale_K.copy_(torch.where(self._weight_K > 0, scale_K, 1.0))

    def take(self, other: ValueScale, tasks: Sequence[tuple[int, int]]) -> None:
        assert isinstance(other, PopArt)
        for here, there in tasks:
            self._moments_2K[:, here] = other._moments_2K[:, there]
            self._weight_K[here] = other._weight_K[there]
        self._settle()

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"value/mean": self.mean_K, "value/scale": self.scale_K}

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self._moments_2K, "weight": self._weight_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments_2K.copy_(state["moments"])
        self._weight_K.copy_(state["weight"])
        self._settle()


class ReturnNorm(ValueScale):
    """Rewards of each task divided by the size of its returns (Lee et al. 2025, "SimbaV2"; Nauman et al. 2025, "BRC").

    Every environment's discounted return of what lies behind, G <- gamma G + reward, runs on, and starts anew with each episode. A task's
    rewards are divided by the standard deviation of all its G so far, or by the largest |G| / limit where that is more, so that no
    return seen so far goes beyond limit. It happens as they are sampled: the replay keeps the game's own.

    Args:
        limit: the largest return; no more than the v_max of a bounded head.
        eps: added to the variance.
    """

    bounds_returns = True
    capturable = True

    def __init__(self, stream: RewardStream, *, limit: PositiveFloat = 10.0, eps: PositiveFloat = 1e-8):
        super().__init__(stream)
        self._gamma, self._limit, self._eps, self._ranks = stream.gamma, limit, eps, stream.ranks
        shape = (stream.num_tasks, stream.num_envs)
        self._return_KN = torch.zeros(shape, dtype=torch.float64, device=stream.device)
        # Number of returns so far, their mean, sum of squared deviations from it, and largest magnitude.
        self._count_K, self._mean_K, self._deviation_K, self._largest_K = self._return_KN.new_zeros(4, stream.num_tasks)
        self._divisor_K = torch.ones(stream.num_tasks, device=stream.device)
        self._settle()

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        reward_KN, ended_KN = self._ranks.joined(torch.stack([reward_KN, done_KN.to(reward_KN.dtype)]), 2)
        self._return_KN.mul_(self._gamma).add_(reward_KN)
        # Chan et al. 1979: the moments of two sets, from those of each.
        number = self._return_KN.shape[1]
        variance_K, mean_K = torch.var_mean(self._return_KN, 1, correction=0)
        apart_K = mean_K - self._mean_K
        share_K = number / (self._count_K + number)
        self._mean_K += apart_K * share_K
        self._deviation_K += number * variance_K + apart_K.square() * (self._count_K * share_K)
        self._count_K += number
        torch.maximum(self._largest_K, self._return_KN.abs().amax(1), out=self._largest_K)
        self._return_KN.masked_fill_(ended_KN.bool(), 0.0)
        self._settle()

    def _settle(self) -> None:
        """What rewards are divided by, as the moments have it."""
        spread_K = (self._deviation_K / self._count_K.clamp_min(1) + self._eps).sqrt()
        self._divisor_K.copy_(torch.maximum(spread_K, self._largest_K / self._limit))

    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        return rewards_KBn / self._divisor_K[:, None, None]

    def takes_from(self, other: ValueScale) -> bool:
        return isinstance(other, ReturnNorm) and other._limit == self._limit

    def take(self, other: ValueScale, tasks: Sequence[tuple[int, int]]) -> None:
        assert isinstance(other, ReturnNorm)
        for here, there in tasks:
            for name in ("count", "mean", "deviation", "largest"):
                getattr(self, f"_{name}_K")[here] = getattr(other, f"_{name}_K")[there]
        self._settle()

    def in_rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._divisor_K, self.mean_K

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"value/scale": self._divisor_K}

    def state_dict(self) -> dict[str, Any]:
        return {
            "returns": self._return_KN,
            "count": self._count_K,
            "mean": self._mean_K,
            "deviation": self._deviation_K,
            "largest": self._largest_K,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._return_KN.copy_(state["returns"])
        self._count_K.copy_(torch.as_tensor(state["count"]))  # one number for all tasks in older checkpoints
        for name in ("mean", "deviation", "largest"):
            getattr(self, f"_{name}_K").copy_(state[name])
        self._settle()
