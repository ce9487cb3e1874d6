"""Scales of rewards and values. Only the learner uses them: metrics and reports contain unscaled returns.

Supported heads of each scale. Heads that predict a distribution over fixed returns (`Head.bounded`: c51, hl_gauss) require returns of a
known range, which some scales guarantee (`ValueScale.bounds_returns`). `config/cross_checks.py` refuses all other pairs.

    none, popart        plain, dueling, quantile
    clip, return_norm   plain, dueling, quantile, c51, hl_gauss
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mtrl_cli.machine.saved import Saved
from mtrl_cli.networks.heads import Head
from mtrl_cli.parallel.distributed import ALONE, Ranks
from mtrl_cli.types import Fraction, PositiveFloat

_MOMENTS = ("count", "mean", "deviation", "largest")
"""Names of the moments of `ReturnNorm` in its state."""


@dataclass(frozen=True)
class RewardStream:
    """Source of the rewards of a scale.

    Attributes:
        num_tasks, num_envs: K and N; N counts the environments of all ranks.
        gamma: discount per step.
        device: device of the learner.
        ranks: processes whose environments share statistics.
    """

    num_tasks: int
    num_envs: int
    gamma: float
    device: torch.device
    ranks: Ranks = ALONE


class ValueScale(Saved):
    """Scale of rewards and values.

    Attributes:
        bounds_returns: whether scaled returns have a range that is known in advance.
        uses_targets: whether `update` changes the scale.
        capturable: whether a CUDA graph can record `rewards` and `update` (`machine/cuda_graphs.py`).
        num_envs: N.
        mean_K, scale_K: float32 `[K]`; outputs of the network are (value - mean) / scale.
    """

    bounds_returns: ClassVar[bool] = False
    uses_targets: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    _limit = math.inf

    def __init__(self, stream: RewardStream):
        self.num_envs = stream.num_envs
        self.mean_K = torch.zeros(stream.num_tasks, device=stream.device)
        self.scale_K = torch.ones(stream.num_tasks, device=stream.device)

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        """Update reward statistics with one step of this rank's environments.

        Args:
            reward_KN: float32 `[K, N]`, unscaled.
            done_KN: bool `[K, N]`, ends of episodes.
        """

    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        """Scale sampled rewards (float32 `[K, B, n]`)."""
        return rewards_KBn

    def update(self, target_KB: torch.Tensor, valid_KB: torch.Tensor, heads: Sequence[Head]) -> None:
        """Update target statistics and rescale the heads so that their values stay the same.

        Args:
            target_KB: float32 `[K, B]`, normalized targets of an update: (target - mean) / scale.
            valid_KB: bool `[K, B]`, valid samples.
            heads: heads of the online and of the target network.
        """

    def is_compatible(self, other: ValueScale) -> bool:
        """Return whether values have the same meaning after `copy_from(other)`."""
        return type(self) is type(other) and self._limit == other._limit

    def copy_from(self, other: ValueScale, tasks: Sequence[tuple[int, int]]) -> None:
        """Copy the statistics of single tasks from another run.

        Args:
            other: scale of the other run.
            tasks: pairs of task numbers, in this run and in the other run.
        """

    def in_rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factor and the offset, float32 `[K]` each, that convert outputs of a network to values of unscaled rewards."""
        return self.scale_K, self.mean_K

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return statistics by name, each float `[K]`."""
        return {}


class NoValueScale(ValueScale):
    """Unscaled rewards."""

    capturable = True


class ClipRewards(ValueScale):
    """Rewards clipped to [-limit, limit] (Mnih et al. 2015, Methods). Returns are at most limit / (1 - gamma), in practice far smaller.

    Args:
        limit: the largest reward that is not clipped.
    """

    bounds_returns = True
    capturable = True

    def __init__(self, stream: RewardStream, *, limit: PositiveFloat = 1.0):
        super().__init__(stream)
        self._limit = limit

    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        return rewards_KBn.clamp(-self._limit, self._limit)


class PopArt(ValueScale):
    """Targets of each task normalized by their running mean and spread (van Hasselt et al. 2016; per task: Hessel et al. 2019).

    Each update moves the first and second moments of the targets of a task, and rescales the last layers of both networks so that no value
    changes (proposition 1). The moments change after the update: targets are normalized by the moments before the update, whereas the paper
    includes the targets of the update. With a small step the difference is negligible. Only the first targets of a run are included in the
    moments before the first update (`Agent.initialise_value_scale`).

    The spread starts as the root mean square of the first targets and becomes their standard deviation as more targets arrive. The first
    targets may be almost equal: normalized by their own spread, the targets would be very far from the outputs of the network.

    Args:
        step_size: fraction by which the moments move towards the moments of an update. The first steps are larger, so that the initial
            moments have no weight. The published value is 3e-4, for runs that are hundreds of times longer. Where values grow faster than
            the moments follow, the growth is counted as spread.
        min_scale: lower bound of the spread.
    """

    uses_targets = True
    capturable = True

    def __init__(self, stream: RewardStream, *, step_size: Fraction = 0.01, min_scale: PositiveFloat = 1e-4):
        super().__init__(stream)
        if not step_size:
            raise ValueError("agent.value_scale.step_size must be above 0 and at most 1, got 0")
        self._step_size = step_size
        self._min_scale = min_scale
        self._ranks = stream.ranks
        # float64, because the spread is a small difference of large moments when targets are far from zero.
        self._moments_2K = torch.zeros(2, stream.num_tasks, dtype=torch.float64, device=stream.device)
        self._weight_K = torch.zeros(stream.num_tasks, dtype=torch.float64, device=stream.device)

    def update(self, target_KB: torch.Tensor, valid_KB: torch.Tensor, heads: Sequence[Head]) -> None:
        mean_K, scale_K = self.mean_K.double(), self.scale_K.double()
        value_KB = self._ranks.joined(target_KB.double() * scale_K[:, None] + mean_K[:, None], 1)
        valid_KB = self._ranks.joined(valid_KB.to(torch.uint8), 1).bool()
        number_K = valid_KB.sum(1)
        batch_moments_2K = torch.stack([value_KB, value_KB.square()]).where(valid_KB, 0.0).sum(2) / number_K.clamp_min(1)
        step_K = torch.where(number_K > 0, self._step_size, 0.0).double()
        self._weight_K += step_K * (1 - self._weight_K)
        self._moments_2K.lerp_(batch_moments_2K, step_K / self._weight_K.clamp_min(1e-300))
        self._set_scale()
        factor_K = scale_K / self.scale_K.double()
        offset_K = (mean_K - self.mean_K.double()) / self.scale_K.double()
        for head in heads:
            head.rescale(factor_K.float(), offset_K.float())

    def _set_scale(self) -> None:
        """Compute mean and scale from the moments; 0 and 1 for a task without targets."""
        mean_K, square_K = self._moments_2K
        variance_K = square_K - self._weight_K * mean_K.square()
        scale_K = variance_K.clamp_min(0).sqrt().clamp_min(self._min_scale)
        self.mean_K.copy_(mean_K)
        self.scale_K.copy_(torch.where(self._weight_K > 0, scale_K, 1.0))

    def copy_from(self, other: ValueScale, tasks: Sequence[tuple[int, int]]) -> None:
        assert isinstance(other, PopArt)
        for here, there in tasks:
            self._moments_2K[:, here] = other._moments_2K[:, there]
            self._weight_K[here] = other._weight_K[there]
        self._set_scale()

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"value/mean": self.mean_K, "value/scale": self.scale_K}

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self._moments_2K, "weight": self._weight_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments_2K.copy_(state["moments"])
        self._weight_K.copy_(state["weight"])
        self._set_scale()


class ReturnNorm(ValueScale):
    """Rewards of each task divided by the size of its returns (Lee et al. 2025, "SimbaV2"; Nauman et al. 2025, "BRC").

    Every environment has a running discounted return of past rewards, G <- gamma G + reward, which is reset at the start of an episode.
    The rewards of a task are divided by the standard deviation of all its G so far or by the largest |G| / limit, whichever is larger, so
    that no return so far exceeds the limit. Rewards are divided when they are sampled: the replay stores unscaled rewards.

    Args:
        limit: the largest return; at most the v_max of a bounded head.
        eps: added to the variance.
    """

    bounds_returns = True
    capturable = True

    def __init__(self, stream: RewardStream, *, limit: PositiveFloat = 10.0, eps: PositiveFloat = 1e-8):
        super().__init__(stream)
        self._gamma = stream.gamma
        self._limit = limit
        self._eps = eps
        self._ranks = stream.ranks
        shape = (stream.num_tasks, stream.num_envs)
        self._return_KN = torch.zeros(shape, dtype=torch.float64, device=stream.device)
        # Count, mean, sum of squared deviations from the mean, and largest magnitude of all returns so far.
        self._moments_4K = self._return_KN.new_zeros(4, stream.num_tasks)
        self._count_K, self._mean_K, self._deviation_K, self._largest_K = self._moments_4K
        self._divisor_K = torch.ones(stream.num_tasks, device=stream.device)
        self._set_divisor()

    def observe(self, reward_KN: torch.Tensor, done_KN: torch.Tensor) -> None:
        reward_KN, ended_KN = self._ranks.joined(torch.stack([reward_KN, done_KN.to(reward_KN.dtype)]), 2)
        self._return_KN.mul_(self._gamma).add_(reward_KN)
        # Chan et al. 1979: combine the moments of two sets.
        number = self._return_KN.shape[1]
        variance_K, mean_K = torch.var_mean(self._return_KN, 1, correction=0)
        difference_K = mean_K - self._mean_K
        share_K = number / (self._count_K + number)
        self._mean_K += difference_K * share_K
        self._deviation_K += number * variance_K + difference_K.square() * (self._count_K * share_K)
        self._count_K += number
        torch.maximum(self._largest_K, self._return_KN.abs().amax(1), out=self._largest_K)
        self._return_KN.masked_fill_(ended_KN.bool(), 0.0)
        self._set_divisor()

    def _set_divisor(self) -> None:
        """Compute the divisor of the rewards from the moments."""
        spread_K = (self._deviation_K / self._count_K.clamp_min(1) + self._eps).sqrt()
        self._divisor_K.copy_(torch.maximum(spread_K, self._largest_K / self._limit))

    def rewards(self, rewards_KBn: torch.Tensor) -> torch.Tensor:
        return rewards_KBn / self._divisor_K[:, None, None]

    def copy_from(self, other: ValueScale, tasks: Sequence[tuple[int, int]]) -> None:
        assert isinstance(other, ReturnNorm)
        for here, there in tasks:
            self._moments_4K[:, here] = other._moments_4K[:, there]
        self._set_divisor()

    def in_rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._divisor_K, self.mean_K

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"value/scale": self._divisor_K}

    def state_dict(self) -> dict[str, Any]:
        return {"returns": self._return_KN} | dict(zip(_MOMENTS, self._moments_4K, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._return_KN.copy_(state["returns"])
        self._moments_4K.copy_(torch.stack([state[name] for name in _MOMENTS]))
        self._set_divisor()
