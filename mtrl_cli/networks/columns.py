"""Sharing structures in which each task selects from the shared activations after every block of the torso."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.parts import tag
from mtrl_cli.networks.per_task import Stacked, TaskLinear, TaskVectors
from mtrl_cli.networks.sharing import Sharing, apply_stem, blocks_of, make_stem, names_in_body, output_shapes
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import Fraction


class CrossStitch(Sharing):
    """A column per task, mixed after every block (Misra et al. 2016, equation 1, with one matrix for all channels of a block).

    A column is a whole torso. The observations of every task pass all K columns. After each block, column i passes on the mean of all
    columns' activations, weighted by row i of a learned K x K matrix. The features of task k are the output of column k. An update
    therefore costs K times as much as with `independent`. All parameters are shared except the last matrix: only task k reads its row k.

    If the tasks have different observation shapes, each has one stem, which all columns read, and columns start with the body.

    Args:
        self_weight: weight of a column's own activation at the start. The other columns share the rest equally, so that weights sum to one
            (section 5.1).
    """

    of_all_tasks = ("mixing", "last_mixing")

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, self_weight: Fraction = 0.9):
        super().__init__(torso, shapes)
        alike = len(set(shapes)) == 1
        self.stem = nn.Identity() if alike else make_stem(torso, shapes)
        blocks = [Stacked([torso.stem(shape) for shape in shapes])] if alike else []
        bodies = [blocks_of(torso.body(shapes[0])) for _ in shapes]
        blocks += [Stacked(modules) for modules in zip(*bodies, strict=True)]
        for block in blocks:
            block.owners = list(range(len(shapes)))  # a column belongs to a task, although other tasks read it
        self.columns = nn.ModuleList(blocks)
        initial_KK = _near_identity(len(shapes), self_weight)
        self.mixing = nn.ParameterList(nn.Parameter(initial_KK.clone()) for _ in blocks[1:])
        self.last_mixing = TaskVectors(initial_KK) if blocks else None

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = self.stem(observation).flatten(0, 1)
        if self.last_mixing is None:
            return self.by_task(x)
        first, *others = self.columns
        assert isinstance(first, Stacked)
        x = first.broadcast(x)  # [K columns, K * B, ...]
        for mixing_KK, column in zip(self.mixing, others, strict=True):
            x = column((mixing_KK.to(x.dtype) @ x.flatten(1)).view_as(x))
        weight_KK = self.last_mixing().to(x.dtype)
        return torch.einsum("kc,ckbf->kbf", weight_KK, x.unflatten(1, (self.num_tasks, -1)))


def _near_identity(size: int, diagonal: float) -> torch.Tensor:
    """Matrix `[size, size]` with a given diagonal whose rows sum to one."""
    if size == 1:
        return torch.ones(1, 1)
    return torch.full((size, size), (1 - diagonal) / (size - 1)).fill_diagonal_(diagonal)


class _Attention(nn.Module):
    """Soft mask of each task over the channels of `[K, B, C, ...]`, from `[K, B, I, ...]`: two layers of kernel 1 with ReLU between."""

    def __init__(self, num_tasks: int, inputs: int, channels: int):
        super().__init__()
        self.hidden = TaskLinear(inputs, [channels] * num_tasks)
        self.mask = TaskLinear(channels, [channels] * num_tasks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.movedim(2, -1)
        mask = self.mask(self.hidden(last.flatten(1, -2)).relu()).sigmoid()
        return mask.unflatten(1, last.shape[1:-1]).movedim(-1, 2)


class MTAN(Sharing):
    """Multi-task attention network (Liu et al. 2019, "End-to-End Multi-Task Learning with Attention", section 3): a shared torso and, for
    each task, a mask in (0, 1) over the features of every block. The stem is the first block.

    The shared features of block j are p_j. The features of a task there are a_j * p_j, with the mask
    a_j = sigmoid(h_j(relu(g_j([p_j; f_j(...)])))). The mask reads the shared features and the task's masked features of the block before,
    which f_j maps to the new shape. Each task has its own g_j and h_j (kernel 1, as many channels as the block); f_j is shared. The
    masked features of the last block go to the head.

    Differences from the paper:

    - A block has one layer instead of two convolutions, so masks read p_j instead of the output u_j of the first convolution.
    - f_j is a block like the torso's j-th instead of a convolution with pooling. It fits every torso, and doubles the shared part.
    - There is no batch normalisation.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.stem = make_stem(torso, shapes)
        blocks = blocks_of(torso.body(shapes[0]))
        self.blocks = nn.ModuleList(blocks)
        self.names_in_torso = names_in_body(blocks, "blocks")
        self.bridges = tag(nn.ModuleList(blocks_of(torso.body(shapes[0]))), None)  # copies of the blocks, not layers of the torso
        channels = [shape[0] for shape in output_shapes([torso.stem(shapes[0]), *self.blocks], shapes[0])]
        inputs = [channels[0], *(2 * each for each in channels[1:])]
        self.attentions = nn.ModuleList(_Attention(len(shapes), *each) for each in zip(inputs, channels, strict=True))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        first, *others = self.attentions
        shared = apply_stem(self.stem, observation)
        shared_KB = self.by_task(shared)
        masked_KB = first(shared_KB) * shared_KB
        for block, bridge, attention in zip(self.blocks, self.bridges, others, strict=True):
            shared = block(shared)
            shared_KB = self.by_task(shared)
            before_KB = self.by_task(bridge(masked_KB.flatten(0, 1)))
            masked_KB = attention(torch.cat([shared_KB, before_KB], 2)) * shared_KB
        return masked_KB
