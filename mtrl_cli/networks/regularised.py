"""Layers that regularise: dropout, and linear layers of spectral norm one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

FIRST_ITERATIONS = 15
"""Steps of the power iteration on a new weight, after which one per update keeps up with it."""


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014), of what is learned from alone: where no gradients are asked for (acting, evaluation, targets)
    everything passes as it is.

    It draws from torch's own generator of the device, from which nothing else draws while a run learns.

    Args:
        share: of the values that become zero; the others are scaled up, so that the mean stays.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.share) if torch.is_grad_enabled() else x


def dropout_generator(device: torch.device, seed: int) -> torch.Generator:
    """The generator that dropout draws from on a device, seeded."""
    generator = torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    return generator.manual_seed(seed)


class SpectralLinear(nn.Linear):
    """A linear layer that computes with weight / sigma(weight), sigma being the largest singular value (Miyato et al. 2018, "Spectral
    Normalization for Generative Adversarial Networks", equation 8): it hardly lengthens what it is given.

    sigma = left . weight right, where a power iteration (`power_step`) lets two vectors follow the weight's first singular vectors. That
    is done once per update, before its forward, and not in the forward itself, which so gives the same for the same parameters.

    Attributes:
        left, right: buffers, float32 `[outputs]` and `[inputs]`, of length one.
    """

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("left", functional.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("right", functional.normalize(torch.randn(inputs), dim=0))
        self.power_step(times=FIRST_ITERATIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Elementwise, so that autocast leaves it in float32.
        sigma = (self.weight * self.left[:, None] * self.right).sum()
        return functional.linear(x, (self.weight / sigma.clamp_min(1e-12)).to(self.weight.dtype), self.bias)

    def power_step(self, *, times: int = 1, frozen: bool = False) -> None:
        """Let the vectors follow the weight; where it is not trained, only if `frozen`."""
        if frozen or self.weight.requires_grad:
            power_step(self.weight, self.left, self.right, times=times)


@torch.no_grad()
def power_step(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, times: int = 1) -> None:
    """Bring vectors nearer to the first singular vectors of a matrix, in place (Miyato et al. 2018, algorithm 1).

    Args:
        weight: float32 `[O, I]`, or a stack of such matrices, `[M, O, I]`.
        left, right: float32 `[O]` and `[I]`, or `[M, O]` and `[M, I]`.
    """
    for _ in range(times):
        right.copy_(functional.normalize((left.unsqueeze(-2) @ weight).squeeze(-2), dim=-1))
        left.copy_(functional.normalize((weight @ right.unsqueeze(-1)).squeeze(-1), dim=-1))
