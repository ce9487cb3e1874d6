"""Sums over binary trees, for drawing in proportion to priorities."""

from __future__ import annotations

import torch


class SumTree:
    """K complete binary trees in one tensor; each inner node is the sum of its two children.

    Node 1 is the root and node i has the children 2i and 2i + 1. Every inner node is always recomputed from its children, never
    adjusted by a difference, so that the tree depends only on its leaves and rounding errors do not accumulate.

    Args:
        num_trees: K.
        size: leaves in use per tree.
        device: of the tensor.
    """

    def __init__(self, num_trees: int, size: int, device: torch.device):
        self._depth = max(1, (size - 1).bit_length())
        self._first_leaf = 1 << self._depth
        self._size = size
        self._nodes = torch.zeros((num_trees, 2 * self._first_leaf), dtype=torch.float64, device=device)

    @property
    def leaves(self) -> torch.Tensor:
        """Priorities, float64 `[K, size]`."""
        return self._nodes[:, self._first_leaf : self._first_leaf + self._size]

    @property
    def nbytes(self) -> int:
        """Memory of all nodes."""
        return self._nodes.nbytes

    def load(self, leaves: torch.Tensor) -> None:
        """Set all leaves (float64 `[K, size]`) and all sums."""
        self.leaves.copy_(leaves)
        for level in reversed(range(self._depth)):
            start, stop = 1 << level, 2 << level
            self._nodes[:, start:stop] = self._nodes[:, 2 * start : 2 * stop].unflatten(1, (-1, 2)).sum(2)

    def set(self, index_KB: torch.Tensor, priority_KB: torch.Tensor) -> None:
        """Set leaves and the sums above them; where an index appears twice in a row, the largest priority counts."""
        node = index_KB + self._first_leaf
        self._nodes.scatter_reduce_(1, node, priority_KB, "amax", include_self=False)
        for _ in range(self._depth):
            node = node >> 1
            self._nodes.scatter_(1, node, self._nodes.gather(1, 2 * node) + self._nodes.gather(1, 2 * node + 1))

    def draw(self, uniform_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Leaves in proportion to their priorities.

        Args:
            uniform_KB: float64 `[K, B]` in [0, 1).

        Returns:
            Indices (int64 `[K, B]`) and their probabilities (float64 `[K, B]`; 0 only where a whole tree is empty).
        """
        total = self._nodes[:, 1:2]
        remaining = uniform_KB * total
        node = torch.ones_like(uniform_KB, dtype=torch.int64)
        for _ in range(self._depth):
            left, right = self._nodes.gather(1, 2 * node), self._nodes.gather(1, 2 * node + 1)
            # Rounding may point past the last leaf that has any priority: never enter an empty half.
            go_right = (remaining >= left) & (right > 0)
            remaining = torch.where(go_right, remaining - left, remaining)
            node = 2 * node + go_right.long()
        probability = self._nodes.gather(1, node) / total.clamp_min(torch.finfo(torch.float64).tiny)
        return (node - self._first_leaf).clamp_max(self._size - 1), probability
