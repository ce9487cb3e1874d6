"""Sharing structures that choose, after every block of the torso, what each task takes of what is shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.parts import mark
from mtrl_cli.networks.per_task import Stacked, TaskLinear, TaskVectors
from mtrl_cli.networks.sharing import Sharing, blocks_of, names_in_body, output_shapes, stem_of, through_stem
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import Fraction


class CrossStitch(Sharing):
    """A column for each task, mixed after every block (Misra et al. 2016, equation 1, with one matrix for all channels of a block).

    A column is a whole torso. Every task's observations go through all K columns; after each block what column i passes on is the mean
    of all columns' activations, weighted by row i of a learned K x K matrix, and a task's features are what its own column gives in the
    end. So an update costs K times as much as with `independent`. All of it is shared but the last matrix: of that, row k is read by
    task k alone.

    Where tasks differ in shape each has one stem of its own, which all columns read, and columns begin with the body.

    Args:
        self_weight: what a column's own activation weighs at first; the other columns share the rest equally, so that weights add up
            to one (section 5.1).
    """

    of_all_tasks = ("mixing", "last_mixing")

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, self_weight: Fraction = 0.9):
        super().__init__(torso, shapes)
        alike = len(set(shapes)) == 1
        self.stem = nn.Identity() if alike else stem_of(torso, shapes)
        blocks = [Stacked([torso.stem(shape) for shape in shapes])] if alike else []
        bodies = [blocks_of(torso.body(shapes[0])) for _ in shapes]
        blocks += [Stacked(modules) for modules in zip(*bodies, strict=True)]
        for block in blocks:
            block.owners = list(range(len(shapes)))  # a column is a task's, though others read it, too
        self.columns = nn.ModuleList(blocks)
        initial_KK = _near_identity(len(shapes), self_weight)
        self.mixing = nn.ParameterList(nn.Parameter(initial_KK.clone()) for _ in blocks[1:])
        self.last_mixing = TaskVectors(initial_KK) if blocks else None

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = self.stem(observation).flatten(0, 1)
        if self.last_mixing is None:
            return x.unflatten(0, (self.num_tasks, -1))
        first, *others = self.columns
        assert isinstance(first, Stacked)
        x = first.of_one(x)  # [K columns, K * B, ...]
        for mixing_KK, column in zip(self.mixing, others, strict=True):
            x = column((mixing_KK.to(x.dtype) @ x.flatten(1)).view_as(x))
        weight_KK = self.last_mixing().to(x.dtype)
        return torch.einsum("kc,ckbf->kbf", weight_KK, x.unflatten(1, (self.num_tasks, -1)))


def _near_identity(size: int, diagonal: float) -> torch.Tensor:
    """`[size, size]`, whose rows add up to one."""
    if size == 1:
        return torch.ones(1, 1)
    return torch.full((size, size), (1 - diagonal) / (size - 1)).fill_diagonal_(diagonal)


class _Attention(nn.Module):
    """Each task's soft mask over the channels of `[K, B, C, ...]`, from `[K, B, I, ...]`: two layers of kernel 1 with ReLU between."""

    def __init__(self, num_tasks: int, inputs: int, channels: int):
        super().__init__()
        self.hidden = TaskLinear(inputs, [channels] * num_tasks)
        self.mask = TaskLinear(channels, [channels] * num_tasks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.movedim(2, -1)
        mask = self.mask(self.hidden(last.flatten(1, -2)).relu()).sigmoid()
        return mask.unflatten(1, last.shape[1:-1]).movedim(-1, 2)


class MTAN(Sharing):
    """Multi-task attention network (Liu et al. 2019, "End-to-End Multi-Task Learning with Attention", section 3): a shared torso,
    and for each task a mask in (0, 1) over the features of every block, the stem being the first.

    Block j's shared features are p_j, a task's features there are a_j * p_j, and its mask a_j = sigmoid(h_j(relu(g_j([p_j; f_j(...)]))))
    reads the shared features beside the task's masked features of the block before, which f_j brings to the new shape; g_j and h_j
    (kernel 1, as many channels as the block) are each task's own, f_j is shared. The masked features of the last block go to the head.

    The paper's blocks have two convolutions, and masks read the first's output u_j; a torso's have one, so u_j is p_j. f_j is a block
    like the torso's own j-th, in place of the paper's convolution and pooling: that fits every torso, and makes the shared part about
    twice as large. Batch normalisation is left out.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.stem = stem_of(torso, shapes)
        blocks = blocks_of(torso.body(shapes[0]))
        self.blocks, self._names_in_torso = nn.ModuleList(blocks), names_in_body(blocks, "blocks")
        self.bridges = mark(nn.ModuleList(blocks_of(torso.body(shapes[0]))), None)  # made like the torso's blocks, and none of them
        channels = [shape[0] for shape in output_shapes([torso.stem(shapes[0]), *self.blocks], shapes[0])]
        inputs = [channels[0], *(2 * each for each in channels[1:])]
        self.attentions = nn.ModuleList(_Attention(len(shapes), *each) for each in zip(inputs, channels, strict=True))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        tasks = (self.num_tasks, -1)
        first, *others = self.attentions
        shared = through_stem(self.stem, observation)
        shared_KB = shared.unflatten(0, tasks)
        masked_KB = first(shared_KB) * shared_KB
        for block, bridge, attention in zip(self.blocks, self.bridges, others, strict=True):
            shared = block(shared)
            shared_KB = shared.unflatten(0, tasks)
            before_KB = bridge(masked_KB.flatten(0, 1)).unflatten(0, tasks)
            masked_KB = attention(torch.cat([shared_KB, before_KB], 2)) * shared_KB
        return masked_KB

    def names_in_torso(self) -> dict[str, str]:
        return self._names_in_torso
