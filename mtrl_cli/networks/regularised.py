"""Regularisation layers: dropout, and linear layers with spectral normalisation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

FIRST_ITERATIONS = 15
"""Power iterations on a new weight. After them, one iteration per update is enough."""


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) in training updates only: without gradients (acting, evaluation, targets) it is the identity.

    It draws from torch's default generator of the device. Nothing else draws from that generator during training.

    Args:
        share: share of the values that become zero; the others are scaled up to keep the mean.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.share) if torch.is_grad_enabled() else x


def dropout_generator(device: torch.device, seed: int) -> torch.Generator:
    """Seed and return the generator of dropout on a device."""
    generator = torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    return generator.manual_seed(seed)


class SpectralLinear(nn.Linear):
    """Linear layer with the weight divided by its largest singular value, sigma (Miyato et al. 2018, "Spectral Normalization for
    Generative Adversarial Networks", equation 8). Its spectral norm is close to one.

    sigma = left . weight right, with two vectors that follow the first singular vectors of the weight by power iteration (`power_step`).
    An update runs one iteration before its forward pass. The forward pass itself changes nothing, so equal parameters give equal outputs.

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
        # Elementwise, because autocast would compute a matrix product in lower precision.
        sigma = (self.weight * self.left[:, None] * self.right).sum()
        return functional.linear(x, (self.weight / sigma.clamp_min(1e-12)).to(self.weight.dtype), self.bias)

    def power_step(self, *, times: int = 1, frozen: bool = False) -> None:
        """Move the vectors towards the singular vectors of the weight; skip a frozen weight unless `frozen`."""
        if frozen or self.weight.requires_grad:
            power_step(self.weight, self.left, self.right, times=times)


@torch.no_grad()
def power_step(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, times: int = 1) -> None:
    """Move vectors towards the first singular vectors of a matrix, in place (Miyato et al. 2018, algorithm 1).

    Args:
        weight: float32 `[O, I]`, or a stack of matrices `[M, O, I]`.
        left, right: float32 `[O]` and `[I]`, or `[M, O]` and `[M, I]`.
        times: number of iterations.
    """
    for _ in range(times):
        right.copy_(functional.normalize((left.unsqueeze(-2) @ weight).squeeze(-2), dim=-1))
        left.copy_(functional.normalize((weight @ right.unsqueeze(-1)).squeeze(-1), dim=-1))
