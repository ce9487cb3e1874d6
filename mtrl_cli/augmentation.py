"""What is done to a batch's observations before the learner sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from mtrl_cli.replay import Batch


class Augmentation(ABC):
    """A batch to a batch of the same shapes.

    Attributes:
        capturable: whether it can be recorded once and replayed (`capture.py`).
    """

    capturable: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, batch: Batch) -> Batch:
        """The batch with other observations."""


class NoAugmentation(Augmentation):
    """The batch as it is."""

    capturable = True

    def __call__(self, batch: Batch) -> Batch:
        return batch
