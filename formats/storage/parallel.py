"""Work on slices side by side, in threads (the compiled loops release the lock), with a bounded number in memory.

What is in memory at a time does not grow with the cores: slices are so small that `IN_FLIGHT` has room for
six, and there are no more threads than that: fewer where rows are long. Slices are the same whatever the number of
threads, so that sums over them are, too. Small ones also stay in a core's cache.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

from gemexport.formats.tensor import Tensor, matrix_of, slices

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 18 << 20  # bytes of float32 values that all threads together work on
SLICE = 3 << 20  # of these in a slice: below it, handing slices to threads takes as long as working on them


def room(item_bytes: int, threads: int | None = None) -> int:
    """How many threads, of `threads` or one a core, may each work on an item of so many bytes: one at least."""
    return max(1, min(threads or os.cpu_count() or 1, IN_FLIGHT // max(item_bytes, 1)))


def by_rows(
    function: Callable[[tuple[int, int]], Result], tensor: Tensor, threads: int | None = None
) -> Iterator[Result]:
    """`function` of the bounds of each slice of a tensor's rows, in order, in as many threads as there is room for."""
    _, width = matrix_of(tensor.shape)
    return ordered(function, slices(tensor, SLICE), room(max(SLICE, 4 * width), threads))


def ordered(function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """`map` over `threads` threads (all cores by default), in order; no more than one result a thread waits."""
    left = iter(items)
    start = list(islice(left, 2))
    if len(start) < 2:  # most tensors of a model are one slice: threads would cost more than they save
        yield from map(function, start)
        return
    workers = threads or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in chain(start, left):
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
