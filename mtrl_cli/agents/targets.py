"""What action values are trained towards, as pure functions."""

from __future__ import annotations

import torch


def n_step_return(rewards_KBn: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards of a window, r_1 + gamma r_2 + ... (Sutton and Barto 2018, equation 7.1, without the bootstrap).

    Args:
        rewards_KBn: float32 `[K, B, n]`, zero past the window's end.

    Returns:
        float32 `[K, B]`.
    """
    powers = torch.arange(rewards_KBn.shape[-1], device=rewards_KBn.device, dtype=rewards_KBn.dtype)
    return (rewards_KBn * gamma**powers).sum(-1)


def bootstrap_value(next_q_KBA: torch.Tensor, choosing_q_KBA: torch.Tensor) -> torch.Tensor:
    """Value of the next state: what one network says of the action that another (or the same) finds best.

    With the online network choosing this is double Q-learning (van Hasselt et al. 2016, equation 4); with the same network
    twice it is the maximum (Mnih et al. 2015). Minus infinity marks invalid actions, which are never chosen.

    Args:
        next_q_KBA: float32 `[K, B, A]`, the values.
        choosing_q_KBA: float32 `[K, B, A]`, whose maximum chooses.

    Returns:
        float32 `[K, B]`.
    """
    return next_q_KBA.gather(-1, choosing_q_KBA.argmax(-1, keepdim=True)).squeeze(-1)


def td_target(
    return_KB: torch.Tensor, steps_KB: torch.Tensor, terminated_KB: torch.Tensor, value_KB: torch.Tensor, gamma: float
) -> torch.Tensor:
    """n-step target: the window's return and, unless it terminated, gamma^m times the value of the state m steps later.

    Args:
        return_KB: float32 `[K, B]`.
        steps_KB: int64 `[K, B]`, the windows' lengths m.
        terminated_KB: bool `[K, B]`.
        value_KB: float32 `[K, B]`.

    Returns:
        float32 `[K, B]`.
    """
    discount_KB = torch.pow(gamma, steps_KB.to(value_KB.dtype))
    return return_KB + torch.where(terminated_KB, 0.0, discount_KB * value_KB)


def huber(error: torch.Tensor, threshold: float) -> torch.Tensor:
    """Half the squared error up to the threshold, linear beyond (Huber 1964); a threshold of 0 means half the squared error."""
    squared = 0.5 * error.square()
    if not threshold:
        return squared
    absolute = error.abs()
    return torch.where(absolute <= threshold, squared, threshold * (absolute - 0.5 * threshold))
