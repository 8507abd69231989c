"""Addresses of lists of tensors that kernels get at every step, read again only where the tensors are others.

Reading them is most of the time that Python takes for the step of a small model.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins in memory."""
    return list(map(Tensor.data_ptr, tensors))


def are(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


class Followed:
    """Which tensors columns of addresses were read of; they are the optimizer's own, so they do not move."""

    def __init__(self) -> None:
        self._columns: dict[int, tuple[Tensor, ...]] = {}

    def changed(self, columns: dict[int, Sequence[Tensor]]) -> dict[int, list[int]]:
        """Addresses for the columns that other tensors have come into. A tuple that was given before costs nothing."""
        changed = {}
        for index, tensors in columns.items():
            known = self._columns.get(index, ())
            if tensors is known:
                continue
            if not are(tensors, known):
                changed[index] = addresses(tensors)
            self._columns[index] = tuple(tensors)
        return changed
