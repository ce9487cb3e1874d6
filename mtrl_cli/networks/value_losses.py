"""How far what a head says is from what it should say, as pure functions: squared and Huber errors, histograms, quantiles.

Z: the numbers by which a distributional head describes the return of one action.
"""

from __future__ import annotations

import math

import torch


def td_target(return_KB: torch.Tensor, discount_KB: torch.Tensor, value_KB: torch.Tensor) -> torch.Tensor:
    """n-step target: the window's return and the discounted value of the state at its end, which may be anything where that is terminal.

    Args:
        return_KB, discount_KB, value_KB: float32 `[K, B]`, or any shapes that go together.

    Returns:
        float32, of their common shape.
    """
    return return_KB + torch.where(discount_KB == 0, 0.0, discount_KB * value_KB)


def huber(error: torch.Tensor, threshold: float) -> torch.Tensor:
    """Half the squared error up to the threshold, linear beyond (Huber 1964); a threshold of 0 means half the squared error."""
    squared = 0.5 * error.square()
    if not threshold:
        return squared
    absolute = error.abs()
    return torch.where(absolute <= threshold, squared, threshold * (absolute - 0.5 * threshold))


def cross_entropy(logits_Z: torch.Tensor, probability_Z: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits against probabilities, both float32 `[..., Z]`; returns `[...]`."""
    return -(probability_Z * logits_Z.log_softmax(-1)).sum(-1)


def project(probability_Z: torch.Tensor, location_Z: torch.Tensor, v_min: float, v_max: float) -> torch.Tensor:
    """Mass at any locations, brought to Z evenly spaced atoms (Bellemare et al. 2017, equation 7).

    Each mass goes to the two atoms around it, the nearer the more, so that total and mean are kept; what lies beyond the first
    or last atom goes to that atom. Written with a share for every pair of location and atom: nothing is scattered, so that the
    sum has one order on every device.

    Args:
        probability_Z, location_Z: float32 `[..., Z]`.
        v_min, v_max: the first and the last atom.

    Returns:
        Probabilities of the atoms, float32 `[..., Z]`.
    """
    last = probability_Z.shape[-1] - 1
    position_Z = ((location_Z - v_min) * (last / (v_max - v_min))).clamp(0, last)
    atom_Z = torch.arange(last + 1, device=position_Z.device, dtype=position_Z.dtype)
    share_ZZ = (1 - (position_Z[..., None, :] - atom_Z[:, None]).abs()).clamp_min(0)
    return (share_ZZ * probability_Z[..., None, :]).sum(-1)


def gaussian_histogram(value: torch.Tensor, edges: torch.Tensor, sigma: float) -> torch.Tensor:
    """What a Gaussian around a value, cut off at the histogram's ends, leaves in each bin (Farebrother et al. 2024, section 3.1).

    Values beyond the ends are first brought to the nearer end, where the published form would divide 0 by 0.

    Args:
        value: float32 `[...]`.
        edges: float32 `[Z + 1]`, ascending.
        sigma: of the Gaussian.

    Returns:
        Probabilities of the bins, float32 `[..., Z]`.
    """
    centre = value.clamp(edges[0], edges[-1])[..., None]
    below = torch.erf((edges - centre) / (math.sqrt(2) * sigma))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


def quantile_huber(quantile_Z: torch.Tensor, target_Z: torch.Tensor, threshold: float) -> torch.Tensor:
    """Quantile regression (Dabney et al. 2018, "QR-DQN", equations 9 and 10; divided by the threshold, as in their "IQN").

    The sum over quantiles, at the levels (i + 1/2) / Z, of the mean over targets. Errors below the threshold count with their
    square; a threshold of 0 gives the plain quantile loss, in which every error counts in proportion.

    Args:
        quantile_Z: float32 `[..., Z]`, predicted.
        target_Z: float32 `[..., Y]`, samples of the target.
        threshold: of the Huber loss.

    Returns:
        float32 `[...]`.
    """
    number = quantile_Z.shape[-1]
    level_Z1 = ((torch.arange(number, device=quantile_Z.device, dtype=quantile_Z.dtype) + 0.5) / number)[:, None]
    error_ZY = target_Z[..., None, :] - quantile_Z[..., None]
    size_ZY = huber(error_ZY, threshold) / threshold if threshold else error_ZY.abs()
    return ((level_Z1 - (error_ZY < 0).to(level_Z1.dtype)).abs() * size_ZY).mean(-1).sum(-1)
