"""Gradients of one layer by task, from its input and the gradient in its output: pure functions.

The samples of K tasks pass a layer together, task after task. The input x and the gradient d of the losses in the output have K * B rows,
or `[K, B]` rows. Samples do not interact, so the gradient of a task follows from its own rows.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

KINDS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
"""Supported layers."""

Rows = dict[str, torch.Tensor]


def rows(layer: nn.Module, x: torch.Tensor, d: torch.Tensor) -> Rows:
    """Gradient of each task in the parameters of a layer.

    Args:
        layer: one of `KINDS`.
        x: input of the layer, `[K, B, ...]`.
        d: gradient of the sum of all tasks' losses in the output, `[K, B, ...]`.

    Returns:
        "weight" and, if the layer has one, "bias": float32 `[K, *parameter]`.
    """
    if isinstance(layer, nn.Linear):
        x, d = x.flatten(1, -2), d.flatten(1, -2)
        return _present(layer, torch.bmm(d.transpose(1, 2), x.to(d.dtype)).float(), d.float().sum(1))
    if isinstance(layer, nn.Conv2d):
        return _present(layer, _convolution_rows(layer, x, d), d.float().sum((1, 3, 4)))
    x, d = x.float(), d.float()
    if isinstance(layer, nn.LayerNorm):
        normal = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        summed = tuple(range(1, d.dim() - len(layer.normalized_shape)))
    else:
        assert isinstance(layer, nn.GroupNorm)
        normal = functional.group_norm(x.flatten(0, 1), layer.num_groups, eps=layer.eps).view(x.shape)
        summed = (1, *range(3, d.dim()))
    return _present(layer, (normal * d).sum(summed), d.sum(summed))


def _present(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> Rows:
    return {name: value for name, value in (("weight", weight), ("bias", bias)) if getattr(layer, name) is not None}


def _convolution_rows(layer: nn.Conv2d, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    # On a CPU, one call per task is as fast as one for all; a grouped convolution or patches are slower (docs/performance.md).
    geometry = (layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups, [False, True, False])
    x, weight = x.to(d.dtype), layer.weight.detach().to(d.dtype)
    each = [torch.ops.aten.convolution_backward(d_B, x_B, weight, None, *geometry)[1] for x_B, d_B in zip(x, d, strict=True)]
    return torch.stack(each).float()


def linear_gram(layer: nn.Linear, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor | None:
    """Inner products of the tasks' gradients in a linear layer, weight and bias, without computing the gradients.

    <G_i, G_j> = sum over samples s of i and t of j of (x_s . x_t + 1) (d_s . d_t). The 1 is for the bias.

    Returns:
        float32 `[K, K]`, or None if computing the gradients is less work.
    """
    K = x.shape[0]
    x, d = x.flatten(1, -2), d.flatten(1, -2)
    samples, inputs, outputs = x.shape[1] * K, x.shape[2], d.shape[2]
    if samples * samples * (inputs + outputs) > (samples + K * K) * inputs * outputs:
        return None
    x, d = x.flatten(0, 1).float(), d.flatten(0, 1).float()
    alike = x @ x.T
    if layer.bias is not None:
        alike = alike + 1
    return (alike * (d @ d.T)).view(K, samples // K, K, samples // K).sum((1, 3))


def linear_combination(layer: nn.Linear, x: torch.Tensor, d: torch.Tensor, weight_K: torch.Tensor) -> Rows:
    """Weighted sum of the tasks' gradients in a linear layer, in one matrix product: "weight" and "bias" in the parameters' shapes."""
    weighted = d.flatten(1, -2) * weight_K.to(d.dtype)[:, None, None]
    weighted = weighted.flatten(0, 1)
    return _present(layer, (weighted.T @ x.flatten(0, -2).to(d.dtype)).float(), weighted.float().sum(0))
