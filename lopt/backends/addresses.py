"""Addresses of lists of tensors that kernels get at every step, read again only where the tensors are others.

Reading them is most of the time that Python takes for the step of a small model.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins in memory.

    Raises:
        TypeError: one has none, as tensors made of other tensors or of no numbers.
    """
    found = list(map(Tensor.data_ptr, tensors))
    if 0 in found:
        kind = type(tensors[found.index(0)]).__name__
        raise TypeError(
            f"a parameter, its gradient or its state is a {kind} without memory of its own, and kernels cannot read "
            f"it: give plain tensors, of an AsyncCollectiveTensor what wait() returns, or pass backend='reference'"
        )
    return found


def are(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


class Followed:
    """Which tensors columns of addresses were read of.

    They are the optimizer's own, and move only if someone sets the `.data` of all of them, or of all of some kinds:
    `stayed` looks at every tensor of one kind and at the first of the others in each step.
    """

    def __init__(self) -> None:
        self._columns: dict[int, tuple[Tensor, ...]] = {}
        self._first: list[int] = []

    def release(self) -> None:
        """Forget them, so that they live no longer than elsewhere."""
        self._columns, self._first = {}, []

    def stayed(self, tensors: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
        """Whether columns are where they were in the last call; if not, all count as changed."""
        first = addresses([*tensors, *[column[0] for column in others if column]])
        if first == self._first:
            return True
        self._first, self._columns = first, {}
        return False

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
