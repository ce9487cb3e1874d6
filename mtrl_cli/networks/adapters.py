"""Sharing structures of one torso that is told the task, or adapted to it, by a few parameters of each task's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.per_task import TaskVectors
from mtrl_cli.networks.sharing import Sharing, blocks_of, names_in_body, output_shapes, stem_of, through_stem
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt


class InputAdapters(Sharing):
    """An input layer for each task, a shared middle (D'Eramo et al. 2020, "Sharing Knowledge in Multi-Task Deep Reinforcement
    Learning", section 4): f_t(h(w_t(x))), where w_t is the torso's stem, h its body and f_t the task's head.

    Unlike with hard sharing each task has its own stem even where all tasks have one shape.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.stem = stem_of(torso, shapes, own=True)
        self.body = torso.body(shapes[0])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.body(through_stem(self.stem, observation)).unflatten(0, (self.num_tasks, -1))


class TaskEmbedding(Sharing):
    """A learned vector per task, joined to the shared torso's features: the learned kind of the one-hot task that multi-task SAC reads
    beside its observations in Yu et al. 2020 ("Meta-World", section 5).

    The vector is appended to the last features of the torso, and one more shared layer (linear, then ReLU; as many units as the torso
    has features) reads both. So what a task makes of the features is learned by a layer that all share; were the vector appended
    right before a task's own head, it would be a bias and no more.

    Args:
        size: length of the vectors. They are standard normal at first.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, size: PositiveInt = 50):
        super().__init__(torso, shapes)
        self.stem = stem_of(torso, shapes)
        self.body = torso.body(shapes[0])
        self.embedding = TaskVectors(torch.randn(len(shapes), size))
        self.joint = nn.Linear(torso.num_features + size, torso.num_features)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        features_KBF = self.body(through_stem(self.stem, observation)).unflatten(0, (self.num_tasks, -1))
        embedding_KBE = self.embedding().to(features_KBF.dtype)[:, None].expand(-1, features_KBF.shape[1], -1)
        return self.joint(torch.cat([features_KBF, embedding_KBE], -1)).relu()


class _Modulation(nn.Module):
    """Per-channel scale and shift by task, of `[K * B, C, ...]`; at first it changes nothing."""

    def __init__(self, num_tasks: int, channels: int):
        super().__init__()
        self.scale = TaskVectors(torch.ones(num_tasks, channels))
        self.shift = TaskVectors(torch.zeros(num_tasks, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale_KC, shift_KC = self.scale().to(x.dtype), self.shift().to(x.dtype)
        x_KBC = x.unflatten(0, (len(scale_KC), -1))
        over = (len(scale_KC), 1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift_KC.view(over), x_KBC, scale_KC.view(over)).flatten(0, 1)


class FiLM(Sharing):
    """Feature-wise linear modulation (Perez et al. 2018, equations 1 and 2): after each block of the shared body every channel is scaled
    and shifted by numbers of the task's own, gamma x + beta. A block's channels are its features where it gives a vector.

    The condition is the task alone, so the paper's generator of gamma and beta is a table: one row for each task, at first 1 and 0.
    Modulation comes after a block's activation. A child of the body without parameters belongs to the block before it; where the body
    has no parameters at all, the stem's output is modulated instead.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.stem = stem_of(torso, shapes)
        blocks = blocks_of(torso.body(shapes[0]))
        self.blocks, self._names_in_torso = nn.ModuleList(blocks), names_in_body(blocks, "blocks")
        after_stem, *after_blocks = output_shapes([torso.stem(shapes[0]), *self.blocks], shapes[0])
        self._on_stem = not any(True for _ in self.blocks.parameters())
        modulated = [after_stem] if self._on_stem else after_blocks
        self.modulations = nn.ModuleList(_Modulation(len(shapes), shape[0]) for shape in modulated)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = through_stem(self.stem, observation)
        if self._on_stem:
            x = nn.Sequential(*self.blocks)(self.modulations[0](x))
        else:
            for block, modulation in zip(self.blocks, self.modulations, strict=True):
                x = modulation(block(x))
        return x.unflatten(0, (self.num_tasks, -1))

    def names_in_torso(self) -> dict[str, str]:
        return self._names_in_torso
