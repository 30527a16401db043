"""Damaged copies of a file, for the tests of every reader."""

import random
from collections.abc import Iterator


def damaged_copies(content: bytes, count: int, seed: int, header_bytes: int | None = None) -> Iterator[bytes]:
    """Yields `count` truncated or bit-flipped versions; half of the flips fall into the header."""
    dice = random.Random(seed)
    for index in range(count):
        if index % 3 == 0:
            yield content[: dice.randrange(len(content))]
            continue
        broken = bytearray(content)
        reach = header_bytes if header_bytes and index % 3 == 1 else len(content)
        for _ in range(dice.choice((1, 1, 2, 8))):
            broken[dice.randrange(reach)] ^= 1 << dice.randrange(8)
        yield bytes(broken)
