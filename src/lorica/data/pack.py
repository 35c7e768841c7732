"""Which records go where: pure arithmetic on indices, the same for the same seed on every machine.

`order` gives the records of an epoch from (seed, epoch) alone, so that a run resumes without any
state of a shuffle. Random numbers are raw output of numpy's Philox generator, which numpy promises
not to change, unlike its shuffles.
"""

from collections.abc import Sequence

import numpy as np


def order(num_records: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    """A permutation of range(num_records), int64, that depends on the arguments only."""
    if num_records < 0 or seed < 0 or epoch < 0:
        raise ValueError(f"negative: num_records {num_records}, seed {seed}, epoch {epoch}")
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_records)
    return np.argsort(keys, kind="stable")


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
