"""Losses between head outputs and their targets, as pure functions: Huber errors, histograms, quantiles.

Z: the number of values that describe the return distribution of one action.
"""

from __future__ import annotations

import math

import torch


def td_target(return_KB: torch.Tensor, discount_KB: torch.Tensor, value_KB: torch.Tensor) -> torch.Tensor:
    """n-step target: the return of the window plus the discounted value of the state at its end.

    Args:
        return_KB, discount_KB, value_KB: float32 `[K, B]`, or any shapes that broadcast. Where the discount is 0 (the window terminated),
            the value is ignored, even if it is not finite.

    Returns:
        float32, of the broadcast shape.
    """
    return return_KB + torch.where(discount_KB == 0, 0.0, discount_KB * value_KB)


def huber(error: torch.Tensor, threshold: float) -> torch.Tensor:
    """Half the squared error up to the threshold, linear beyond it (Huber 1964). A threshold of 0 gives half the squared error."""
    squared = 0.5 * error.square()
    if not threshold:
        return squared
    absolute = error.abs()
    return torch.where(absolute <= threshold, squared, threshold * (absolute - 0.5 * threshold))


def cross_entropy(logits_Z: torch.Tensor, probability_Z: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits and target probabilities, both float32 `[..., Z]`; returns `[...]`."""
    return -(probability_Z * logits_Z.log_softmax(-1)).sum(-1)


def project(probability_Z: torch.Tensor, location_Z: torch.Tensor, v_min: float, v_max: float) -> torch.Tensor:
    """Project probability mass at arbitrary locations onto Z evenly spaced atoms (Bellemare et al. 2017, equation 7).

    Each mass is divided between its two neighbouring atoms by distance, which keeps total and mean. Mass beyond the first or last atom
    goes to that atom. The share of every pair of location and atom is computed, instead of a scatter, so that the order of the sum is
    the same on every device.

    Args:
        probability_Z, location_Z: float32 `[..., Z]`.
        v_min, v_max: first and last atom.

    Returns:
        Probabilities of the atoms, float32 `[..., Z]`.
    """
    last = probability_Z.shape[-1] - 1
    position_Z = ((location_Z - v_min) * (last / (v_max - v_min))).clamp(0, last)
    atom_Z = torch.arange(last + 1, device=position_Z.device, dtype=position_Z.dtype)
    share_ZZ = (1 - (position_Z[..., None, :] - atom_Z[:, None]).abs()).clamp_min(0)
    return (share_ZZ * probability_Z[..., None, :]).sum(-1)


def gaussian_histogram(value: torch.Tensor, edges: torch.Tensor, sigma: float) -> torch.Tensor:
    """Probability of each bin under a Gaussian around a value, truncated to the histogram's range (Farebrother et al. 2024, section 3.1).

    Values outside the range are clipped to it first. The published form would divide 0 by 0 far outside the range.

    Args:
        value: float32 `[...]`.
        edges: float32 `[Z + 1]`, ascending.
        sigma: standard deviation of the Gaussian.

    Returns:
        Probabilities of the bins, float32 `[..., Z]`.
    """
    centre = value.clamp(edges[0], edges[-1])[..., None]
    below = torch.erf((edges - centre) / (math.sqrt(2) * sigma))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


def quantile_huber(quantile_Z: torch.Tensor, target_Z: torch.Tensor, threshold: float) -> torch.Tensor:
    """Quantile regression loss (Dabney et al. 2018, "QR-DQN", equations 9 and 10; divided by the threshold, as in their "IQN").

    The loss is the sum over quantiles, at the levels (i + 1/2) / Z, of the mean over targets. Errors below the threshold are squared. A
    threshold of 0 gives the quantile loss without squares.

    Args:
        quantile_Z: float32 `[..., Z]`, predicted quantiles.
        target_Z: float32 `[..., Y]`, samples of the target.
        threshold: threshold of the Huber loss.

    Returns:
        float32 `[...]`.
    """
    number = quantile_Z.shape[-1]
    level_Z1 = ((torch.arange(number, device=quantile_Z.device, dtype=quantile_Z.dtype) + 0.5) / number)[:, None]
    error_ZY = target_Z[..., None, :] - quantile_Z[..., None]
    size_ZY = huber(error_ZY, threshold) / threshold if threshold else error_ZY.abs()
    return ((level_Z1 - (error_ZY < 0).to(level_Z1.dtype)).abs() * size_ZY).mean(-1).sum(-1)
