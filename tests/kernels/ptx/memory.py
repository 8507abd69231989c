"""What a kernel's threads load and store, and whether they may: bounds, alignment, initial values, races.

Memory of a GPU is memory of this process: an address is an address, and allowed where the launch says so. Two accesses
to the same place, one of them a store, need an order between them, whatever the hardware would do first. There is one

    within a thread;
    within a warp, if a barrier of the warp lies between;
    within a block, if a barrier of the block does;
    between blocks, if the earlier one's meets at a barrier, a thread of it then issues a fence and an atomic operation,
        and one of the later one's sees the result of that, issues a fence, and meets the others at a barrier.

Accesses are told apart to two bytes. Stores of the value that is already there do not race with other stores. Not
judged: atomic operations themselves, and whether global memory has been written before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

Array = npt.NDArray
WARP = 32
GRANULE = 2  # bytes
LOWEST, HIGHEST = 1 << 16, 1 << 48  # addresses of a process
SHARED, LOCAL = 1 << 56, 1 << 57  # where these memories lie among generic addresses
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EVERYTHING = np.frombuffer((ctypes.c_uint8 * (HIGHEST - LOWEST)).from_address(LOWEST), np.uint8)


class Fault(AssertionError):
    """What a kernel must not do."""


class Clock:
    """What has happened before what.

    Attributes:
        block, warp: each thread's barriers of its block and of its warp so far.
        seen: [blocks, blocks] what is visible to the first of two blocks: all that the second did before as many of
            its barriers. It is visible to the first one's thread `by`, and to its others after its barrier `at`.
    """

    def __init__(self, blocks: int, threads: int) -> None:
        self.threads = threads
        self.block, self.warp = np.zeros((2, blocks * threads), np.int32)
        self.seen, self.at, self.by = np.full((3, blocks, blocks), -1, np.int32)
        self.fenced = np.full(blocks * threads, -1, np.int32)  # each thread's block barriers at its last fence
        self.published: dict[int, dict[int, int]] = {}  # address -> block -> barriers
        self.drawn: dict[int, dict[int, int]] = {}  # thread -> the same, not fenced yet

    def fence(self, thread: int) -> None:
        self.fenced[thread] = self.block[thread]
        block = thread // self.threads
        for other, barriers in self.drawn.pop(thread, {}).items():
            if barriers > self.seen[block, other]:
                self.seen[block, other] = barriers
                self.at[block, other], self.by[block, other] = self.block[thread], thread

    def atomic(self, thread: int, address: int, orders: bool) -> None:
        """An atomic operation; `orders` where it is a fence before and behind itself."""
        if orders:
            self.fence(thread)
        published = self.published.setdefault(address, {})
        self.drawn[thread] = {key: value for key, value in published.items() if key != thread // self.threads}
        if self.fenced[thread] == self.block[thread]:
            published[thread // self.threads] = int(self.block[thread])
        if orders:
            self.fence(thread)

    def ordered(self, earlier: Array, barriers: Array, syncs: Array, group: int, thread: Array) -> Array:
        """Whether accesses come before one of `thread` now.

        They were by `earlier`, and perhaps others of its warp (group WARP) or block (group `threads`), after as many
        barriers of the block and of the warp.
        """
        ours, theirs = thread // self.threads, earlier // self.threads
        within = barriers < self.block[thread]
        if group <= WARP:
            within |= (earlier // WARP == thread // WARP) & (syncs < self.warp[thread])
        if group == 1:
            within |= earlier == thread
        if len(self.seen) == 1:
            return within
        met = (thread == self.by[ours, theirs]) | (self.block[thread] > self.at[ours, theirs])
        return np.where(ours == theirs, within, (barriers < self.seen[ours, theirs]) & met)

    def after_all(self, barriers: Array, thread: Array) -> Array:
        """Whether what each block did after so many barriers is visible: [blocks, accesses], -1 where it did none."""
        ours = thread // self.threads
        visible = (barriers < self.seen[ours].T) & (
            (thread == self.by[ours].T) | (self.block[thread] > self.at[ours].T)
        )
        own = np.arange(len(barriers))[:, None] == ours
        return ((barriers < 0) | np.where(own, barriers < self.block[thread], visible)).all(0)


ONE, ONE_WARP, ONE_BLOCK, MANY = range(4)  # who has used a granule: one thread, or several of a warp, a block, or more


def widen(kind: Array, first: Array, second: Array, threads: int) -> None:
    """Let kinds cover both of two threads."""
    for wider, size in ((ONE_WARP, 1), (ONE_BLOCK, WARP), (MANY, threads)):
        kind[(first // size != second // size) & (kind < wider)] = wider


def spread(kinds: Array, kind: Array, at: Array, last: Array, thread: Array, threads: int) -> None:
    """Note kinds of granules, of which one instruction may use one for several threads; `last` is one of them."""
    kinds[at] = kind
    if (last != thread).any():
        widen(kind, last, thread, threads)
        np.maximum.at(kinds, at, kind)


class Shadow:
    """Who last stored to and who loaded each granule of a piece of memory, in this launch; thread -1 is nobody."""

    def __init__(self, size: int) -> None:
        granules = -(-size // GRANULE)
        self.writer, self.reader = np.full((2, granules), -1, np.int32)
        self.written, self.written_sync, self.read, self.read_sync = np.zeros((4, granules), np.int32)
        self.writers, self.readers = np.zeros((2, granules), np.int8)
        self.by_block: Array | None = None  # [blocks, granules] barriers before the last load, where there are MANY
        self.last_store = -1  # barriers before it

    def load(self, clock: Clock, at: Array, thread: Array, quiet: bool) -> Array:
        """Take down loads of granules by threads, both [threads, granules]; returns where they race.

        quiet: every store so far comes before.
        """
        reader, read = self.reader[at], self.read[at]
        kind = np.zeros(at.shape, np.int8)
        fresh = reader < 0
        if not fresh.all():
            here = reader // clock.threads == thread // clock.threads
            fresh |= here & (read < clock.block[thread]) & (self.readers[at] < MANY)
            if not quiet and not fresh.all():
                fresh |= self._read_before(clock, at, thread) & (self.readers[at] < MANY)
            kind = np.where(fresh, kind, self.readers[at])
            widen(kind, np.where(fresh, thread, reader), thread, clock.threads)
        self.reader[at], self.read[at], self.read_sync[at] = thread, clock.block[thread], clock.warp[thread]
        spread(self.readers, kind, at, self.reader[at], thread, clock.threads)
        if (many := self.readers[at] == MANY).any():
            self._take_down(clock, at[many], thread[many], reader[many], read[many])
        if quiet:
            return np.zeros(at.shape, bool)
        return (self.writer[at] >= 0) & ~self._written_before(clock, at, thread)

    def store(self, clock: Clock, at: Array, thread: Array) -> tuple[Array, Array]:
        """Take down stores to granules by threads; returns where they race with loads, and where with stores."""
        writer, kind = self.writer[at], self.writers[at]
        with_stores = (writer >= 0) & ~self._written_before(clock, at, thread)
        with_loads = (self.reader[at] >= 0) & ~self._read_before(clock, at, thread)
        kind = np.where(with_stores, kind, ONE).astype(np.int8)
        widen(kind, np.where(with_stores, writer, thread), thread, clock.threads)
        self.writer[at], self.written[at], self.written_sync[at] = thread, clock.block[thread], clock.warp[thread]
        spread(self.writers, kind, at, self.writer[at], thread, clock.threads)
        self.last_store = max(self.last_store, int(clock.block[thread].max()))
        return with_loads, with_stores

    def _written_before(self, clock: Clock, at: Array, thread: Array) -> Array:
        """Whether all stores to granules come before what threads do now."""
        written = self.writer[at], self.written[at], self.written_sync[at]
        return self._before(clock, *written, self.writers[at], thread) & (self.writers[at] < MANY)

    def _read_before(self, clock: Clock, at: Array, thread: Array) -> Array:
        """Whether all loads of granules come before what threads do now."""
        kind = self.readers[at]
        before = self._before(clock, self.reader[at], self.read[at], self.read_sync[at], kind, thread)
        if (many := kind == MANY).any():
            assert self.by_block is not None
            before[many] = clock.after_all(self.by_block[:, at[many]], thread[many])
        return before

    @staticmethod
    def _before(clock: Clock, earlier: Array, barriers: Array, syncs: Array, kind: Array, thread: Array) -> Array:
        """Whether accesses by those that `kind` says of `earlier`, MANY apart, come before what threads do now."""
        before = clock.ordered(earlier, barriers, syncs, 1, thread)
        for several, group in ((ONE_WARP, WARP), (ONE_BLOCK, clock.threads)):
            if (kind == several).any():
                before = np.where(kind == several, clock.ordered(earlier, barriers, syncs, group, thread), before)
        return before

    def _take_down(self, clock: Clock, at: Array, thread: Array, reader: Array, read: Array) -> None:
        """Note which blocks have loaded granules: that of `thread` now, that of `reader` before."""
        if self.by_block is None:
            self.by_block = np.full((len(clock.seen), len(self.reader)), -1, np.int32)
        known = reader >= 0
        blocks, at_ = reader[known] // clock.threads, at[known]
        self.by_block[blocks, at_] = np.maximum(self.by_block[blocks, at_], read[known])
        self.by_block[thread // clock.threads, at] = clock.block[thread]


def granules(offset: Array, size: int) -> Array:
    """[accesses, granules of one]"""
    return (offset // GRANULE)[:, None] + np.arange(-(-size // GRANULE))


def judge(races: Array, thread: Array, what: str) -> None:
    """Raise a Fault where accesses by threads race."""
    if races.any():
        raise Fault(f"a race: a {what} by thread {thread[races][0]}")


class Segment:
    """A piece of memory: its bytes, as part of `data`, and who used them.

    Attributes:
        begin: where it begins in `data`. size: in bytes, of one owner's part.
    """

    def __init__(self, data: Array, begin: int, size: int) -> None:
        self.data, self.begin, self.size = data, begin, size
        self.shadow: Shadow | None = None


class Memory:
    """All memory that the threads of a launch can reach."""

    def __init__(self, clock: Clock, blocks: int, shared: int, local: int, allowed: Iterable[tuple[int, int]]) -> None:
        self.clock, threads = clock, clock.threads
        allowed = list(allowed)
        self.begins = np.array([begin for begin, _ in allowed], np.int64)
        self.pieces = [Segment(EVERYTHING, begin - LOWEST, end - begin) for begin, end in allowed]
        self.shared_stride, self.local_stride = (-(-size // 16) * 16 for size in (shared, local))
        self.shared = Segment(np.zeros(blocks * self.shared_stride, np.uint8), 0, shared)
        self.shared.shadow = Shadow(blocks * self.shared_stride)
        self.local = Segment(np.full(blocks * threads * self.local_stride, 0xA5, np.uint8), 0, local)

    def load(self, space: str, address: Array, thread: Array, width: int, count: int, constant: bool = False) -> Array:
        """`count` neighbouring numbers of `width` bytes for each thread: [count, threads].

        `constant` loads need not see what the launch itself has written.
        """
        result = np.empty((count, len(thread)), UNSIGNED[width])
        for part, segment, offset in self._reach(space, address, thread, width * count):
            if shadow := segment.shadow:
                at = granules(offset, width * count)
                own = np.broadcast_to(thread[part][:, None], at.shape)
                if constant and (shadow.writer[at] >= 0).any():
                    raise Fault("a constant load of what the launch has written")
                if segment is self.shared and (shadow.writer[at] < 0).any():
                    raise Fault(f"a load of shared memory that nobody has written, by thread {own[0, 0]}")
                quiet = shadow.last_store < (self.clock.block[own].min() if segment is self.shared else 0)
                judge(shadow.load(self.clock, at, own, quiet), own, f"load of {space or 'any'} memory")
            numbers, places = segment.data.view(UNSIGNED[width]), (segment.begin + offset) // width
            for i in range(count):
                result[i, part] = numbers[places + i]
        return result

    def store(self, space: str, address: Array, thread: Array, values: Array) -> None:
        """Store values [count, threads], each thread's as neighbours."""
        width, count = values.dtype.itemsize, len(values)
        for part, segment, offset in self._reach(space, address, thread, width * count):
            numbers, places = segment.data.view(values.dtype), (segment.begin + offset) // width
            if shadow := segment.shadow:
                at = granules(offset, width * count)
                own = np.broadcast_to(thread[part][:, None], at.shape)
                changed = np.any([numbers[places + i] != values[i, part] for i in range(count)], 0)[:, None]
                with_loads, with_stores = shadow.store(self.clock, at, own)
                judge(with_loads | with_stores & changed, own, f"store to {space or 'any'} memory")
            for i in range(count):
                numbers[places + i] = values[i, part]
            if any((numbers[places + i] != values[i, part]).any() for i in range(count)):
                raise Fault(f"threads of one instruction store different values to one place of {space} memory")

    def add(self, space: str, address: int, thread: int, value: np.unsignedinteger, orders: bool) -> int:
        """An atomic addition by one thread, see `Clock.atomic`; returns what was there before."""
        width = value.itemsize
        ((_, segment, offset),) = self._reach(space, np.array([address], np.uint64), np.array([thread]), width)
        numbers, place = segment.data.view(value.dtype), (segment.begin + int(offset[0])) // width
        before = int(numbers[place])
        numbers[place] = (before + int(value)) % (1 << 8 * width)
        self.clock.atomic(thread, address, orders)
        return before

    def _reach(self, space: str, address: Array, thread: Array, size: int) -> Iterator[tuple[Array, Segment, Array]]:
        """Of addresses that may lie in several pieces: which do in this one, the piece, and offsets from its begin."""
        if (address % np.uint64(size)).any():
            raise Fault(f"an access of {size} bytes that is not aligned to as many, in {space or 'any'} memory")
        if space == "":
            for name, window, above in (("global", 0, SHARED), ("shared", SHARED, LOCAL), ("local", LOCAL, 2 * LOCAL)):
                chosen = np.flatnonzero((address >= window) & (address < above))
                if len(chosen):
                    for part, *rest in self._reach(name, address[chosen] - np.uint64(window), thread[chosen], size):
                        yield (chosen[part], *rest)
            return
        offset = address.astype(np.int64)
        if space != "global":
            segment, stride = (
                (self.shared, self.shared_stride) if space == "shared" else (self.local, self.local_stride)
            )
            if offset.min() < 0 or offset.max() + size > segment.size:
                raise Fault(f"an access beyond the {segment.size} bytes of {space} memory, at {offset.max()}")
            owner = thread // self.clock.threads if space == "shared" else thread
            yield np.arange(len(offset)), segment, offset + owner * stride
            return
        piece = np.searchsorted(self.begins, offset, side="right") - 1
        for index in np.unique(piece):
            part = np.flatnonzero(piece == index)
            if index < 0:
                raise Fault(f"an access of {size} bytes to global memory that is no tensor's, before all of them")
            segment, inside = self.pieces[index], offset[part] - self.begins[index]
            if inside.max() + size > segment.size:
                where = f"{int(inside.max())} bytes behind the begin of one that has {segment.size}"
                raise Fault(f"an access of {size} bytes to global memory that is no tensor's, {where}")
            if segment.shadow is None:
                segment.shadow = Shadow(segment.size)
            yield part, segment, inside
