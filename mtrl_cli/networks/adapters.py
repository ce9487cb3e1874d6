"""Sharing structures of one torso that a few parameters per task adapt to the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtrl_cli.networks.per_task import TaskVectors, append_per_task
from mtrl_cli.networks.sharing import HardSharing, Sharing, apply_stem, blocks_of, has_parameters, make_stem, names_in_body, output_shapes
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt


class InputAdapters(HardSharing, Sharing):
    """An input layer per task and a shared body (D'Eramo et al. 2020, "Sharing Knowledge in Multi-Task Deep Reinforcement Learning",
    section 4): f_t(h(w_t(x))), with the stem w_t, the body h and the head f_t.

    Unlike hard sharing, each task has a stem even if all tasks have one observation shape.
    """

    own_stems = True


class TaskEmbedding(HardSharing, Sharing):
    """A learned vector per task, appended to the features of a shared torso. It replaces the one-hot task that multi-task SAC reads with
    its observations in Yu et al. 2020 ("Meta-World", section 5).

    One more shared layer (linear, then ReLU, with as many units as the torso has features) reads the features and the vector. Without this
    layer the vector would act as a bias of the task's head.

    Args:
        size: length of the vectors. They are standard normal at the start.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, size: PositiveInt = 50):
        super().__init__(torso, shapes)
        self.embedding = TaskVectors(torch.randn(len(shapes), size))
        self.joint = nn.Linear(torso.num_features + size, torso.num_features)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.joint(append_per_task(super().forward(observation), self.embedding())).relu()


class _Modulation(nn.Module):
    """Scale and shift per task and channel for inputs `[K * B, C, ...]`; the identity at the start."""

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
    """Feature-wise linear modulation (Perez et al. 2018, equations 1 and 2): after each block of the shared body, every channel is scaled
    and shifted by parameters of the task, gamma x + beta. The channels of a vector are its features.

    The condition is the task, so the paper's generator of gamma and beta becomes a table with one row per task (1 and 0 at the start).
    Modulation follows the activation of a block. A child of the body without parameters belongs to the block before it. If the body has
    no parameters, the output of the stem is modulated instead.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]]):
        super().__init__(torso, shapes)
        self.stem = make_stem(torso, shapes)
        blocks = blocks_of(torso.body(shapes[0]))
        self.blocks = nn.ModuleList(blocks)
        self.names_in_torso = names_in_body(blocks, "blocks")
        after_stem, *after_blocks = output_shapes([torso.stem(shapes[0]), *self.blocks], shapes[0])
        self._on_stem = not has_parameters(self.blocks)
        modulated = [after_stem] if self._on_stem else after_blocks
        self.modulations = nn.ModuleList(_Modulation(len(shapes), shape[0]) for shape in modulated)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = apply_stem(self.stem, observation)
        if self._on_stem:
            return self.by_task(nn.Sequential(*self.blocks)(self.modulations[0](x)))
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            x = modulation(block(x))
        return self.by_task(x)
