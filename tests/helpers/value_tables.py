"""Action values as a table, for hand-computed losses."""

from __future__ import annotations

import torch
from torch import nn

from mtrl_cli.networks.heads import PlainHead

STATES = 3


class Table(nn.Module):
    """Action values `[K, STATES, A]` of one-hot states; None marks an action that the task does not have."""

    def __init__(self, values: list[list[list[float | None]]]):
        super().__init__()
        self.head = PlainHead(1, [sum(value is not None for value in task[0]) for task in values])
        self.values = nn.Parameter(torch.tensor([[[value or 0.0 for value in state] for state in task] for task in values]))

    def outputs(self, observation: torch.Tensor) -> torch.Tensor:
        return torch.bmm(observation, self.values)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.head.values(self.outputs(observation))


ONLINE = [[[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]]]


def one_hot(states: list[list[int]]) -> torch.Tensor:
    """`[K, B, 1, STATES]`: stacks of one frame."""
    return nn.functional.one_hot(torch.tensor(states), STATES).float()[:, :, None]
