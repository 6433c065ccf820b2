"""Random numbers that are a function of what they are for, never of who draws them.

In: a purpose, a seed, an epoch and an item (a sample, a lane). Out: a numpy generator at the start of that item's own
stream. Philox is a counter-based generator: the seed and the epoch are its key, the purpose and the item are the high
words of its counter, so streams cannot overlap and no state is carried between samples, threads or processes.
The price is the construction of a generator for each item, some 10 microseconds; a shared generator would be cheaper and
would make every sample depend on the order in which the samples before it were drawn.
"""

from enum import IntEnum

import numpy as np

_WORD = 1 << 64


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the order format; never renumber."""

    SHARDS = 0
    WINDOWS = 1
    CROP = 2
    NOISE = 3
    BUILD = 4
    MIX = 5


def stream(purpose: Purpose, *, seed: int, epoch: int = 0, item: int = 0) -> np.random.Generator:
    """Return the generator of one item.

    Args:
        purpose: What is drawn; different purposes are independent.
        seed: Seed of the run or of the build, 0 <= seed < 2**64.
        epoch: Pass over the data, from 0.
        item: Sample, lane or picture the numbers belong to, from 0.
    """
    key = (seed % _WORD) | (epoch << 64)
    counter = (item << 128) | (int(purpose) << 192)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
