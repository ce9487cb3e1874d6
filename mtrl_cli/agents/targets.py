"""Training targets of action values, as pure functions."""

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


def discount(steps_KB: torch.Tensor, terminated_KB: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discount of the state at the end of a window: gamma^m, or 0 where the state is terminal.

    Args:
        steps_KB: int64 `[K, B]`, lengths m of the windows.
        terminated_KB: bool `[K, B]`.

    Returns:
        float32 `[K, B]`.
    """
    return torch.pow(gamma, steps_KB.float()).masked_fill(terminated_KB, 0.0)


def of_action(outputs_KBA: torch.Tensor, action_KB: torch.Tensor) -> torch.Tensor:
    """Outputs of one action: `[K, B, A]` or `[K, B, A, Z]` and int64 `[K, B]` to `[K, B]` or `[K, B, Z]`."""
    index = action_KB.reshape(*action_KB.shape, *[1] * (outputs_KBA.ndim - 2))
    return outputs_KBA.gather(2, index.expand(-1, -1, 1, *outputs_KBA.shape[3:])).squeeze(2)


def bootstrap_value(next_outputs: torch.Tensor, selection_q_KBA: torch.Tensor) -> torch.Tensor:
    """Value of the next state: the output of one network for the best action of another (or the same) network.

    Selection by the online network is double Q-learning (van Hasselt et al. 2016, equation 4); with the same network twice the result
    is the maximum (Mnih et al. 2015). Invalid actions are minus infinity and never selected.

    Args:
        next_outputs: float32 `[K, B, A]`, values, or `[K, B, A, Z]`, distributions.
        selection_q_KBA: float32 `[K, B, A]`, values whose maximum selects the action.

    Returns:
        float32 `[K, B]` or `[K, B, Z]`.
    """
    return of_action(next_outputs, selection_q_KBA.argmax(-1))


def mean_of_draws(tensor: torch.Tensor, draws: int) -> torch.Tensor:
    """Average the draws of each sample: draw-major `[K, draws * B]` to `[K, B]`."""
    return tensor.unflatten(1, (draws, -1)).mean(1)


def lambda_returns(
    rewards_KTN: torch.Tensor,
    values_KTN: torch.Tensor,
    terminated_KTN: torch.Tensor,
    truncated_KTN: torch.Tensor,
    gamma: float,
    trace_decay: float,
) -> torch.Tensor:
    """Lambda-returns of a rollout, mixtures of n-step returns: Peng's Q(lambda) (Peng and Williams 1994; Gallici et al. 2024).

    G_t = r_t + gamma ((1 - lambda) v_t+1 + lambda G_t+1), without the bracket where the step terminated, and G_T = v_T.
    The successor of a truncated step is not stored: the step has no return, and G_t = v_t is the bootstrap value of the step before.

    Args:
        rewards_KTN: float32 `[K, T, N]`.
        values_KTN: float32 `[K, T + 1, N]`, v_t, greedy values of the observations of the steps and of the observation after the last step.
        terminated_KTN, truncated_KTN: bool `[K, T, N]`; never both.
        gamma: discount per step.
        trace_decay: lambda.

    Returns:
        float32 `[K, T, N]`.
    """
    next_value_KTN = values_KTN[:, 1:].masked_fill(terminated_KTN, 0.0)
    # G_t = known_t + weight_t G_t+1, from the last step to the first.
    known_KTN = torch.where(truncated_KTN, values_KTN[:, :-1], rewards_KTN + gamma * (1 - trace_decay) * next_value_KTN)
    weight_KTN = (~(terminated_KTN | truncated_KTN)).to(rewards_KTN.dtype) * (gamma * trace_decay)
    returns, following_KN = [], values_KTN[:, -1]
    for known_KN, weight_KN in zip(reversed(known_KTN.unbind(1)), reversed(weight_KTN.unbind(1)), strict=True):
        following_KN = torch.addcmul(known_KN, weight_KN, following_KN)
        returns.append(following_KN)
    return torch.stack(returns[::-1], 1)
