"""Sharing structures of experts: several modules of one structure, and gates that mix what they give.

An expert is what the torso has after its stem, so that the torso's own widths are the expert's. What all experts read is the
stem's output: one stem for all tasks where their observations have one shape, else a stem for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mtrl_cli.networks.per_task import PerTask, Stacked, TaskLinear, TaskVectors
from mtrl_cli.networks.sharing import Sharing, blocks_of, output_shapes, stem_of, through_stem
from mtrl_cli.networks.torsos import Torso
from mtrl_cli.types import PositiveInt

WHOLE = math.inf  # as many blocks as there are


@dataclass(frozen=True)
class Parts:
    """A torso divided for experts.

    Attributes:
        stem: what `through_stem` takes; an `nn.Identity` where experts read observations.
        shape: of what experts read, without the batch.
        blocks: newly initialised blocks, of which one expert is made.
    """

    stem: nn.Module
    shape: tuple[int, ...]
    blocks: Callable[[], list[nn.Module]]


def parts_of(torso: Torso, shapes: Sequence[tuple[int, ...]], *, least: float = 1) -> Parts:
    """Divide a torso into what all experts read and the blocks that they are made of, which are the body's.

    Where the body has fewer blocks than `least` and tasks observe one shape, the stem is the first block instead.

    Raises:
        ValueError: the body is empty, and tasks differ in observation shape.
    """

    def body() -> list[nn.Module]:
        return list(blocks_of(torso.body(shapes[0])))

    depth = len(body())
    if len(set(shapes)) == 1 and depth < least:
        return Parts(nn.Identity(), shapes[0], lambda: [torso.stem(shapes[0]), *body()])
    if not depth:
        raise ValueError(
            "network.hidden has one layer, which is each task's own where tasks differ in observation shape, and leaves none to share: "
            "expected two at least, for example network.hidden=[256,256]"
        )
    return Parts(stem_of(torso, shapes), output_shapes([torso.stem(shapes[0])], shapes[0])[0], body)


def stemmed(stem: nn.Module, observation: torch.Tensor) -> torch.Tensor:
    """Observations `[K, B, ...]` through what `stem_of` gave: `[K, B, ...]` in the dtype of the observations."""
    # Under autocast a normalisation gives float32, and stacked experts would compute in it.
    return through_stem(stem, observation).to(observation.dtype).unflatten(0, (len(observation), -1))


def read_by_gate(x_KB: torch.Tensor) -> torch.Tensor:
    """What a gate reads of features `[K, B, C, ...]`: `[K, B, C]`, of an image the mean of each channel over its positions."""
    return x_KB.flatten(3).mean(-1) if x_KB.dim() > 3 else x_KB


def mix(weight_KBM: torch.Tensor, x_MKB: torch.Tensor) -> torch.Tensor:
    """Sum over M of weights `[K, B, M]` (or `[K, 1, M]`) times features `[M, K, B, ...]`: `[K, B, ...]`."""
    weight_KBM = weight_KBM.to(x_MKB.dtype).expand(-1, x_MKB.shape[2], -1)
    return torch.einsum("kbm,mkb...->kb...", weight_KBM, x_MKB)


class _Gate(nn.Module):
    """Softmax of a linear layer per task, or of one for all."""

    def __init__(self, shape: tuple[int, ...], choices: int, num_tasks: int | None):
        super().__init__()
        self.linear = nn.Linear(shape[0], choices) if num_tasks is None else TaskLinear(shape[0], [choices] * num_tasks)

    def forward(self, x_KB: torch.Tensor) -> torch.Tensor:
        """Features `[K, B, C, ...]` to weights `[K, B, choices]` (float32), which sum to one."""
        return self.linear(read_by_gate(x_KB)).float().softmax(-1)


class MMoE(Sharing):
    """Multi-gate Mixture-of-Experts (Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
    Mixture-of-Experts", equations 6 to 8): all tasks share the experts, and a gate of each task's own, linear with a softmax,
    mixes them by the sample's features.

    Experts and gates read what the stem gives (the paper's: an embedding of the input), gates a mean over positions of images.

    Args:
        experts: how many; 8 in the paper.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, experts: PositiveInt = 8):
        super().__init__(torso, shapes)
        parts = parts_of(torso, shapes)
        self.stem = parts.stem
        self.experts = Stacked([nn.Sequential(*parts.blocks()) for _ in range(experts)])
        self.gate = _Gate(parts.shape, experts, self.num_tasks)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = stemmed(self.stem, observation)
        return mix(self.gate(x), self.experts.of_one(x.flatten(0, 1)).unflatten(1, (self.num_tasks, -1)))

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"experts": self.gate(stemmed(self.stem, observation)).mean(1)}


class _Extraction(nn.Module):
    """The lower level of PLE: each task's own experts and the shared ones, each task's gate and that of the shared features."""

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
        """Inputs `[K, B, ...]` to each task's features and the shared ones, both `[K, B, ...]`."""
        x_MKB = self.experts.of_one(x_KB.flatten(0, 1)).unflatten(1, (len(x_KB), -1))
        own, shared = self.gate(x_KB).split(self._sizes, -1)
        # Over all tasks' experts, those of other tasks without weight.
        own_KBM = (own.unsqueeze(2) * self.mine_KK[:, None, :, None]).flatten(2)
        return mix(torch.cat([own_KBM, shared], -1), x_MKB), mix(self.shared_gate(x_KB), x_MKB)


class PLE(Sharing):
    """Progressive Layered Extraction (Tang et al. 2020, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for
    Personalized Recommendations", section 4): beside shared experts each task has its own, in two levels.

    In the upper level a task's gate mixes its own experts, which read the task's features, and the shared ones, which read shared
    features. In the lower level, which makes both, the task's gate does the same, while the gate of the shared features mixes the
    experts of *all* tasks (section 4.2): so every task reaches what is a task's own there, and tasks separate above. Each sample
    passes all tasks' lower experts for it, so these have the first half of the blocks only.
    A gate reads the input of its level, a mean over positions of images.

    The lower level needs a block that all tasks can read. Where there is none to spare (tasks of different shapes and a body of one
    block, for example `network.hidden=[256,256]`) there is only the upper level, which is the paper's CGC (section 4.1).

    Args:
        shared_experts: how many are shared, in each level.
        task_experts: how many each task has, in each level. The paper tunes both.
    """

    of_all_tasks = ("lower.shared_gate",)

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, shared_experts: PositiveInt = 1, task_experts: PositiveInt = 1):
        super().__init__(torso, shapes)
        parts = parts_of(torso, shapes, least=2)
        blocks, shape = parts.blocks(), parts.shape
        below, tasks = len(blocks) // 2, range(self.num_tasks)
        self.stem = parts.stem
        self.lower: _Extraction | None = None
        if below:
            number = self.num_tasks * task_experts + shared_experts
            each = [nn.Sequential(*parts.blocks()[:below]) for _ in range(number)]
            self.lower = _Extraction(each, shared_experts, shape, self.num_tasks)
            shape = output_shapes(blocks[:below], shape)[-1]

        def upper() -> nn.Module:
            return nn.Sequential(*parts.blocks()[below:])

        self.task_experts = nn.ModuleList(PerTask([upper() for _ in tasks]) for _ in range(task_experts))
        self.shared_experts = Stacked([upper() for _ in range(shared_experts)])
        self.gate = _Gate(shape, task_experts + shared_experts, self.num_tasks)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        own_KB, shared_KB = self._extract(stemmed(self.stem, observation))
        experts = [expert(own_KB).unsqueeze(0) for expert in self.task_experts]
        experts.append(self.shared_experts.of_one(shared_KB.flatten(0, 1)).unflatten(1, (self.num_tasks, -1)))
        return mix(self.gate(own_KB), torch.cat(experts))

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of each level: a task's own experts, then the shared ones. "lower/shared": all tasks' own in turn, then the shared ones."""
        x_KB = stemmed(self.stem, observation)
        gates = {"experts": self.gate(self._extract(x_KB)[0])}
        if self.lower is not None:
            gates |= {"lower/experts": self.lower.gate(x_KB), "lower/shared": self.lower.shared_gate(x_KB)}
        return {name: gate.mean(1) for name, gate in gates.items()}

    def _extract(self, x_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x_KB, x_KB) if self.lower is None else self.lower(x_KB)


def orthonormal(x_EBF: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt over the first dimension (Hendawy et al. 2024, section 4), for each sample: float32 `[E, B, F]` to `[E, B, F]`.

    A vector that lies in the span of those before it has no direction of its own, and becomes about zero or any other.
    """
    basis: list[torch.Tensor] = []
    for x_BF in x_EBF:
        # One after the other ("modified"): the same but for rounding, of which less stays where vectors are nearly parallel.
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
    section 4): for each state Gram-Schmidt makes the experts' representations orthonormal, and a task mixes them with weights that
    are its own, and neither positive nor of sum one.

    As in the official code experts end without an activation, tanh follows the mixture, and weights start as Xavier-uniform.
    An expert is a whole torso where tasks observe one shape, else its body.

    Args:
        experts: how many; 4 in the paper (Meta-World MT10, MiniGrid MT7).

    Raises:
        ValueError: more experts than features.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, experts: PositiveInt = 4):
        super().__init__(torso, shapes)
        if experts > torso.num_features:
            raise ValueError(
                f"network.sharing.experts={experts} cannot be orthogonal to each other in {torso.num_features} features: "
                "expected fewer experts, or more features"
            )
        parts = parts_of(torso, shapes, least=WHOLE)
        self.stem = parts.stem
        self.experts = Stacked([_without_last_activation(nn.Sequential(*parts.blocks())) for _ in range(experts)])
        self.task_weights = TaskVectors(nn.init.xavier_uniform_(torch.empty(self.num_tasks, experts)))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = stemmed(self.stem, observation).flatten(0, 1)
        with torch.autocast(observation.device.type, enabled=False):
            basis_EKBF = orthonormal(self.experts.of_one(x).float()).unflatten(1, (self.num_tasks, -1))
            return mix(self.task_weights().unsqueeze(1), basis_EKBF).tanh()

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each expert's share of a feature vector's squared length before tanh: its squared weight, as experts are orthonormal."""
        squared_KE = self.task_weights().square()
        return {"experts": squared_KE / squared_KE.sum(1, keepdim=True)}


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class CARE(Sharing):
    """Contextual Attention-based Representation (Sodhani et al. 2021, "Multi-Task Reinforcement Learning with Context-based
    Representations", figure 3): a context of the task attends to encoders, and their mixture joined to the context gives the features.

    The paper makes the context of a language model's embedding of the task's description. There is none here: the embedding is
    learned, as in the official code without metadata, and learns from the attention, too. Attention is the official code's: a
    softmax of a network that reads the context alone, where the paper compares the context with each encoding.
    An encoder is a whole torso where tasks observe one shape, else its body.

    Args:
        experts: how many encoders; 6 in the paper.
        context: units of the embedding, of the context and of the hidden layers between; 50 in the official code.
    """

    def __init__(self, torso: Torso, shapes: Sequence[tuple[int, ...]], *, experts: PositiveInt = 6, context: PositiveInt = 50):
        super().__init__(torso, shapes)
        self.num_features = torso.num_features + context
        parts = parts_of(torso, shapes, least=WHOLE)
        self.stem = parts.stem
        self.experts = Stacked([nn.Sequential(*parts.blocks()) for _ in range(experts)])
        self.embedding = TaskVectors(torch.randn(self.num_tasks, context))
        self.context = nn.Sequential(nn.ReLU(), *_mlp(context, context, context))
        self.attention = _mlp(context, context, experts)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = stemmed(self.stem, observation).flatten(0, 1)
        encoding_EKBF = self.experts.of_one(x).unflatten(1, (self.num_tasks, -1))
        context_KC, attention_KE = self._attend()
        mixed_KBF = mix(attention_KE.unsqueeze(1), encoding_EKBF)
        context_KBC = context_KC.to(mixed_KBF.dtype).unsqueeze(1).expand(-1, mixed_KBF.shape[1], -1)
        return torch.cat([mixed_KBF, context_KBC], -1)

    def routing(self, observation: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"experts": self._attend()[1]}

    def _attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tasks' contexts `[K, C]` and their attention to the encoders `[K, E]`."""
        context_KC = self.context(self.embedding())
        return context_KC, self.attention(context_KC).float().softmax(-1)
