"""Which records go where: pure arithmetic on indices, the same for the same seed on every machine.

Places in the data are counted in samples. `order` gives the records of an epoch from (seed, epoch)
alone, so that a run resumes at sample p by asking for the samples from p on; no state is kept.
Random numbers are raw output of numpy's Philox generator, which numpy promises not to change,
unlike its shuffles.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lorica.errors import DataError


def order(num_records: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    """A permutation of range(num_records), int64, that depends on the arguments only."""
    if num_records < 0 or seed < 0 or epoch < 0:
        raise ValueError(f"negative: num_records {num_records}, seed {seed}, epoch {epoch}")
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_records)
    return np.argsort(keys, kind="stable")


def samples(start: int, count: int, *, num_records: int, seed: int) -> np.ndarray:
    """The records at the places start .. start + count - 1 of an endless run over the data.

    Place p lies in epoch p // num_records; each epoch has its own order.

    Returns:
        (count,) int64 indices of records.

    Raises:
        DataError: there are no records.
    """
    if num_records < 1:
        raise DataError("there are no records to sample from")
    parts = [np.empty(0, dtype=np.int64)]
    stop = start + count
    while start < stop:
        epoch, offset = divmod(start, num_records)
        part = order(num_records, seed=seed, epoch=epoch)[offset : offset + stop - start]
        parts.append(part)
        start += len(part)
    return np.concatenate(parts)


def batches(
    lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int = 0, group: int = 1
) -> list[list[int]]:
    """The batches of one epoch; every record is in exactly one.

    Args:
        lengths: tokens per record.
        batch_size: records per batch; only the last batch may be smaller.
        seed, epoch: decide the order.
        group: batches of similar length: records are sorted by length within stretches of
            `group * batch_size` shuffled records, and the batches shuffled again. 1: no grouping.
    """
    if batch_size < 1 or group < 1:
        raise ValueError(f"batch_size {batch_size} and group {group} must be at least 1")
    indices = order(len(lengths), seed=seed, epoch=epoch)
    if group > 1:
        sizes = np.asarray(lengths)[indices]
        stretch = np.arange(len(indices)) // (group * batch_size)
        indices = indices[np.lexsort((sizes, stretch))]
    made = [indices[i : i + batch_size].tolist() for i in range(0, len(indices), batch_size)]
    if group > 1:
        full = len(lengths) // batch_size
        shuffled = order(full, seed=seed + 1, epoch=epoch)
        made[:full] = [made[i] for i in shuffled]
    return made


def pack(lengths: Sequence[int], *, capacity: int, seed: int | None = None) -> list[list[int]]:
    """Put documents into bins by first-fit decreasing (at most 11/9 of the fewest bins + 1).

    Every document is in exactly one bin, whole. Bins hold indices in ascending order.

    Args:
        lengths: tokens per document, at least 1 each.
        capacity: tokens per bin.
        seed: shuffles documents of equal length among each other, and the bins. None: the order of
            the documents decides, and bins come in the order in which they were opened.

    Raises:
        DataError: a document does not fit into a bin, or is empty.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, capacity)
    ties = np.arange(len(sizes)) if seed is None else order(len(sizes), seed=seed)
    decreasing = ties[np.argsort(-sizes[ties], kind="stable")]
    bins: list[list[int]] = []
    space = _Space(len(sizes))
    for length, documents in _runs(decreasing, sizes):
        while documents:
            number = space.first(length)
            if number is None:
                number = space.open(capacity)
                bins.append([])
            # documents of equal length fill the bin while they fit: first-fit would do the same
            taken = min(len(documents), space.free(number) // length)
            bins[number] += documents[:taken]
            documents = documents[taken:]
            space.take(number, taken * length)
    for content in bins:
        content.sort()
    if seed is not None:
        bins = [bins[i] for i in order(len(bins), seed=seed, epoch=1)]
    return bins


def efficiency(bins: Sequence[Sequence[int]], lengths: Sequence[int], *, capacity: int) -> float:
    """The share of the bins' room that documents fill; 1.0 without bins."""
    filled = sum(lengths[index] for content in bins for index in content)
    return filled / (len(bins) * capacity) if bins else 1.0


def _check(sizes: np.ndarray, capacity: int) -> None:
    problems = []
    if len(sizes) and sizes.min() < 1:
        problems.append(f"document {int(sizes.argmin())} has {int(sizes.min())} tokens")
    if len(sizes) and sizes.max() > capacity:
        count = int((sizes > capacity).sum())
        longest = int(sizes.max())
        problems.append(
            f"{count:,} documents are longer than {capacity:,}; the longest: {longest:,}"
        )
    if problems:
        raise DataError(
            "documents cannot be packed",
            problems=problems,
            expected=f"1 to {capacity:,} tokens each",
            mend="cut them with max_length, or raise the capacity",
        )


def _runs(decreasing: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(length, documents of that length), longest first."""
    if not len(decreasing):
        return
    sorted_sizes = sizes[decreasing]
    changes = np.flatnonzero(np.diff(sorted_sizes)) + 1
    for part in np.split(decreasing, changes):
        yield int(sizes[part[0]]), part.tolist()


class _Space:
    """Free room of bins in a segment tree: the first bin with enough room in log time."""

    def __init__(self, most: int) -> None:
        self._leaves = 1
        while self._leaves < most:
            self._leaves *= 2
        self._tree = [0] * (2 * self._leaves)
        self._count = 0

    def free(self, number: int) -> int:
        return self._tree[self._leaves + number]

    def first(self, length: int) -> int | None:
        """The first open bin with room for `length`."""
        if self._tree[1] < length:
            return None
        node = 1
        while node < self._leaves:
            node = 2 * node if self._tree[2 * node] >= length else 2 * node + 1
        return node - self._leaves

    def open(self, capacity: int) -> int:
        self._count += 1
        self._set(self._count - 1, capacity)
        return self._count - 1

    def take(self, number: int, length: int) -> None:
        self._set(number, self.free(number) - length)

    def _set(self, number: int, room: int) -> None:
        node = self._leaves + number
        self._tree[node] = room
        while node > 1:
            node //= 2
            self._tree[node] = max(self._tree[2 * node], self._tree[2 * node + 1])
