"""Sharing structures with experts: several modules of one structure, mixed by gates.

An expert is made of the torso's blocks after the stem, so the torso's widths are the widths of an expert. All experts read the output of
the stem: one stem for all tasks if their observations have one shape, else a stem per task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mtrl_cli.networks.per_task import PerTask, Stacked, TaskLinear, TaskVectors, append_per_task
from mtrl_cli.networks.sharing import Sharing, apply_stem, blocks_of, make_stem, output_shapes
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt

ALL_BLOCKS = math.inf


@dataclass(frozen=True)
class TorsoSplit:
    """A torso divided into the input of experts and the blocks of experts.

    Attributes:
        stem: module for `apply_stem`; `nn.Identity` if experts read observations.
        shape: shape of an expert's input, without the batch.
        blocks: factory of newly initialised blocks for one expert.
    """

    stem: nn.Module
    shape: tuple[int, ...]
    blocks: Callable[[], list[nn.Module]]

    def expert(self) -> nn.Sequential:
        """Make a newly initialised expert of all blocks."""
        return nn.Sequential(*self.blocks())


def split_torso(torso: Torso, shapes: Sequence[tuple[int, ...]], *, least: float = 1) -> TorsoSplit:
    """Divide a torso into the stem, which all experts read, and the blocks of the body, which experts are made of.

    If the body has fewer than `least` blocks and all tasks have one observation shape, the stem becomes the first block of the experts.

    Raises:
        ValueError: the body is empty and the tasks have different observation shapes.
    """

    def body() -> list[nn.Module]:
        return list(blocks_of(torso.body(shapes[0])))

    depth = len(body())
    if len(set(shapes)) == 1 and depth < least:
        return TorsoSplit(nn.Identity(), shapes[0], lambda: [torso.stem(shapes[0]), *body()])
    if not depth:
        raise ValueError(
            "network.hidden must have at least 2 layers for tasks of different observation shapes, got 1: the first layer is not shared; "
            "for example network.hidden=[256,256]"
        )
    return TorsoSplit(make_stem(torso, shapes), output_shapes([torso.stem(shapes[0])], shapes[0])[0], body)


def encode(stem: nn.Module, observation: torch.Tensor) -> torch.Tensor:
    """Apply a stem to observations `[K, B, ...]`: `[K, B, ...]` in the dtype of the observations."""
    # Under autocast a normalisation layer returns float32, and stacked experts would compute in float32.
    return apply_stem(stem, observation).to(observation.dtype).unflatten(0, (len(observation), -1))


def apply_experts(experts: Stacked, x_KB: torch.Tensor) -> torch.Tensor:
    """Apply E shared experts to all samples `[K, B, ...]`: `[E, K, B, ...]`."""
    return experts.broadcast(x_KB.flatten(0, 1)).unflatten(1, (len(x_KB), -1))


def mix(weight_KBM: torch.Tensor, x_MKB: torch.Tensor) -> torch.Tensor:
    """Weighted sum over M of features `[M, K, B, ...]` with weights `[K, B, M]` (or `[K, 1, M]`): `[K, B, ...]`."""
    weight_KBM = weight_KBM.to(x_MKB.dtype).expand(-1, x_MKB.shape[2], -1)
    return torch.einsum("kbm,mkb...->kb...", weight_KBM, x_MKB)


class _Gate(nn.Module):
    """Softmax of a linear layer, one per task or one for all tasks (`num_tasks` None)."""

    def __init__(self, shape: tuple[int, ...], choices: int, num_tasks: int | None):
        super().__init__()
        self.linear = nn.Linear(shape[0], choices) if num_tasks is None else TaskLinear(shape[0], [choices] * num_tasks)

    def forward(self, x_KB: torch.Tensor) -> torch.Tensor:
        """Features `[K, B, C, ...]` to weights `[K, B, choices]` (float32), which sum to one. An image is averaged over its positions."""
        x_KBC = x_KB.flatten(3).mean(-1) if x_KB.dim() > 3 else x_KB
        return self.linear(x_KBC).float().softmax(-1)


class MMoE(Sharing):
    """Multi-gate Mixture-of-Experts (Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
    Mixture-of-Experts", equations 6 to 8).

    All tasks share the experts. A gate per task, linear with a softmax, mixes the experts by the features of each sample. Experts and
    gates read the output of the stem (in the paper an embedding of the input). Gates read the mean over the positions of an image.

    Args:
        experts: number of experts; 8 in the paper.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, experts: PositiveInt = 8):
        super().__init__(torso, shapes)
        split = split_torso(torso, shapes)
        self.stem = split.stem
        self.experts = Stacked([split.expert() for _ in range(experts)])
        self.gate = _Gate(split.shape, experts, self.num_tasks)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x_KB = encode(self.stem, observation)
        return mix(self.gate(x_KB), apply_experts(self.experts, x_KB))

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"experts": self.gate(encode(self.stem, observation)).mean(1)}


class _Extraction(nn.Module):
    """Lower level of PLE: experts of each task, shared experts, a gate per task and a gate for the shared features."""

    mine_KK: torch.Tensor

    def __init__(self, experts: Sequence[nn.Module], shared: int, shape: tuple[int, ...], num_tasks: int):
        super().__init__()
        own = (len(experts) - shared) // num_tasks
        self._sizes = [own, shared]
        self.experts = Stacked(experts)
        self.experts.owners = [task for task in range(num_tasks) for _ in range(own)] + [None] * shared
        self.gate = _Gate(shape, own + shared, num_tasks)
        self.shared_gate = _Gate(shape, len(experts), None)
        self.register_buffer("mine_KK", torch.eye(num_tasks), persistent=False)

    def forward(self, x_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs `[K, B, ...]` to the features of each task and the shared features, both `[K, B, ...]`."""
        x_MKB = apply_experts(self.experts, x_KB)
        own, shared = self.gate(x_KB).split(self._sizes, -1)
        # Weights over the experts of all tasks, zero for those of other tasks.
        own_KBM = (own.unsqueeze(2) * self.mine_KK[:, None, :, None]).flatten(2)
        return mix(torch.cat([own_KBM, shared], -1), x_MKB), mix(self.shared_gate(x_KB), x_MKB)


class PLE(Sharing):
    """Progressive Layered Extraction (Tang et al. 2020, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for
    Personalized Recommendations", section 4): shared experts and experts of each task, in two levels.

    In the upper level the gate of a task mixes the task's experts, which read the features of the task, and the shared experts, which
    read the shared features. The lower level makes both kinds of features. There the gate of a task works the same way, and the gate of
    the shared features mixes the experts of *all* tasks (section 4.2). So lower experts have gradients of every task, and tasks separate
    in the upper level. Every sample passes all lower experts, so these have only the first half of the blocks. A gate reads the input of
    its level, averaged over the positions of an image.

    The lower level needs a block that all tasks can read. If there is no such block (different observation shapes and a body of one
    block, for example `network.hidden=[256,256]`), the structure has only the upper level, which is the paper's CGC (section 4.1).

    Args:
        shared_experts: number of shared experts in each level.
        task_experts: number of experts of each task in each level. The paper tunes both numbers.
    """

    of_all_tasks = ("lower.shared_gate",)

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, shared_experts: PositiveInt = 1, task_experts: PositiveInt = 1):
        super().__init__(torso, shapes)
        split = split_torso(torso, shapes, least=2)
        blocks, shape = split.blocks(), split.shape
        lower = len(blocks) // 2
        self.stem = split.stem
        self.lower: _Extraction | None = None
        if lower:
            number = self.num_tasks * task_experts + shared_experts
            experts = [nn.Sequential(*split.blocks()[:lower]) for _ in range(number)]
            self.lower = _Extraction(experts, shared_experts, shape, self.num_tasks)
            shape = output_shapes(blocks[:lower], shape)[-1]

        def upper(number: int) -> list[nn.Module]:
            return [nn.Sequential(*split.blocks()[lower:]) for _ in range(number)]

        self.task_experts = nn.ModuleList(PerTask(upper(self.num_tasks)) for _ in range(task_experts))
        self.shared_experts = Stacked(upper(shared_experts))
        self.gate = _Gate(shape, task_experts + shared_experts, self.num_tasks)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        own_KB, shared_KB = self._extract(encode(self.stem, observation))
        experts = [expert(own_KB).unsqueeze(0) for expert in self.task_experts]
        return mix(self.gate(own_KB), torch.cat([*experts, apply_experts(self.shared_experts, shared_KB)]))

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gate weights of each level: the task's experts, then the shared ones; in "lower/shared" the experts of all tasks in turn, then
        the shared ones."""
        x_KB = encode(self.stem, observation)
        gates = {"experts": self.gate(self._extract(x_KB)[0])}
        if self.lower is not None:
            gates |= {"lower/experts": self.lower.gate(x_KB), "lower/shared": self.lower.shared_gate(x_KB)}
        return {name: gate.mean(1) for name, gate in gates.items()}

    def _extract(self, x_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x_KB, x_KB) if self.lower is None else self.lower(x_KB)


def orthonormal(x_EBF: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt over the first dimension (Hendawy et al. 2024, section 4), for each sample: float32 `[E, B, F]` to `[E, B, F]`.

    A vector in the span of the vectors before it has no direction left: its result is close to zero or arbitrary.
    """
    basis: list[torch.Tensor] = []
    for x_BF in x_EBF:
        # Modified Gram-Schmidt (one vector at a time) has smaller rounding errors for nearly parallel vectors.
        for unit_BF in basis:
            x_BF = x_BF - (x_BF * unit_BF).sum(-1, keepdim=True) * unit_BF
        basis.append(nn.functional.normalize(x_BF, dim=-1, eps=1e-6))
    return torch.stack(basis)


def _without_last_activation(layers: nn.Sequential) -> nn.Sequential:
    *before, last = layers
    if isinstance(last, nn.Sequential):
        return nn.Sequential(*before, _without_last_activation(last))
    return nn.Sequential(*before) if isinstance(last, nn.ReLU) else layers


class MOORE(Sharing):
    """Mixture of Orthogonal Experts (Hendawy et al. 2024, "Multi-Task Reinforcement Learning with Mixture of Orthogonal Experts",
    section 4).

    For each state, Gram-Schmidt makes the representations of the experts orthonormal. Each task mixes them with its own weights, which may
    be negative and need not sum to one. As in the official code, experts end without an activation, tanh follows the mixture, and weights
    are Xavier-uniform at the start. An expert is a whole torso if all tasks have one observation shape, else a body.

    Args:
        experts: number of experts; 4 in the paper (Meta-World MT10, MiniGrid MT7).

    Raises:
        ValueError: more experts than features.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, experts: PositiveInt = 4):
        super().__init__(torso, shapes)
        if experts > torso.num_features:
            raise ValueError(f"network.sharing.experts must be at most the number of features, {torso.num_features}, got {experts}")
        split = split_torso(torso, shapes, least=ALL_BLOCKS)
        self.stem = split.stem
        self.experts = Stacked([_without_last_activation(split.expert()) for _ in range(experts)])
        self.task_weights = TaskVectors(nn.init.xavier_uniform_(torch.empty(self.num_tasks, experts)))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x_KB = encode(self.stem, observation)
        with torch.autocast(observation.device.type, enabled=False):
            basis_EBF = orthonormal(self.experts.broadcast(x_KB.flatten(0, 1)).float())
            return mix(self.task_weights().unsqueeze(1), basis_EBF.unflatten(1, (self.num_tasks, -1))).tanh()

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Share of each expert in a feature vector's squared length before tanh: its squared weight, as experts are orthonormal."""
        squared_KE = self.task_weights().square()
        return {"experts": squared_KE / squared_KE.sum(1, keepdim=True)}


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class CARE(Sharing):
    """Contextual Attention-based Representation (Sodhani et al. 2021, "Multi-Task Reinforcement Learning with Context-based
    Representations", figure 3): a context vector of the task attends to encoders. Their mixture and the context are the features.

    The paper derives the context from a language model's embedding of the task description. Here the embedding is learned, as in the
    official code without metadata, and the attention also trains it. The attention is that of the official code: a softmax of a network
    that reads only the context. The paper compares the context with each encoding. An encoder is a whole torso if all tasks have one
    observation shape, else a body.

    Args:
        experts: number of encoders; 6 in the paper.
        context: units of the embedding, the context and the hidden layers between them; 50 in the official code.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, experts: PositiveInt = 6, context: PositiveInt = 50):
        super().__init__(torso, shapes)
        self.num_features = torso.num_features + context
        split = split_torso(torso, shapes, least=ALL_BLOCKS)
        self.stem = split.stem
        self.experts = Stacked([split.expert() for _ in range(experts)])
        self.embedding = TaskVectors(torch.randn(self.num_tasks, context))
        self.context = nn.Sequential(nn.ReLU(), *_mlp(context, context, context))
        self.attention = _mlp(context, context, experts)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        encoding_EKBF = apply_experts(self.experts, encode(self.stem, observation))
        context_KC, attention_KE = self._attend()
        return append_per_task(mix(attention_KE.unsqueeze(1), encoding_EKBF), context_KC)

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"experts": self._attend()[1]}

    def _attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return task contexts `[K, C]` and attention weights over the encoders `[K, E]`."""
        context_KC = self.context(self.embedding())
        return context_KC, self.attention(context_KC).float().softmax(-1)
