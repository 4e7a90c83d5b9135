"""A pool of threads that each own their buffers, and stop at the first error or Ctrl-C.

Threads are enough: reading, writing and torch's kernels all let other threads run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from numbers import Integral
from typing import Generic, TypeVar

from blockmerge.errors import RecipeError, shown

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), always from the thread that started the work."""

Task = TypeVar("Task")

_MOST_THREADS = 64
_POLL = 0.05  # seconds between two looks at the progress


def thread_count(threads: int | None) -> int:
    """Return how many threads to use when `threads` are asked for. Raises RecipeError for what is no count."""
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, Integral) or threads < 1:
        raise RecipeError(f"'{shown(threads)}' is no number of threads: a whole number from 1 up")
    return min(int(threads), _MOST_THREADS)


def default_threads() -> int:
    """Twice the processors, since half of the workers wait for the disk; never more than 8, which keeps memory small."""
    return max(2, min(8, 2 * processors()))


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_each(
    tasks: Iterable[Task],
    worker: Callable[[], AbstractContextManager[Callable[[Task], int]]],
    threads: int,
    total: int,
    progress: Progress | None = None,
) -> None:
    """Do all `tasks` on `threads` threads.

    `worker()` is entered once in each thread and gives the function that does one task and returns its bytes. The first
    error stops all threads and is raised here; so does an exception in this thread, such as Ctrl-C. When this returns
    or raises, no thread is running any more.
    """
    pool = _Pool(iter(tasks), worker)
    running = [threading.Thread(target=pool.run, name=f"blockmerge-{n}", daemon=True) for n in range(threads)]
    try:
        for thread in running:
            thread.start()
        # Waits in short steps: an unlimited wait cannot be interrupted on every system, and the progress moves on.
        for thread in running:
            while thread.is_alive():
                thread.join(_POLL)
                if progress:
                    progress(pool.done, total)
    finally:
        pool.stop.set()
        _join_all(running)
    if pool.errors:
        raise pool.errors[0]
    if progress:
        progress(total, total)


def _join_all(threads: list[threading.Thread]) -> None:
    """Wait for all threads, whatever happens meanwhile: a second Ctrl-C is raised when they have ended."""
    interrupted: KeyboardInterrupt | None = None
    for thread in threads:
        while thread.ident is not None and thread.is_alive():
            try:
                thread.join(_POLL)
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted


class _Pool(Generic[Task]):
    def __init__(self, tasks: Iterator[Task], worker: Callable[[], AbstractContextManager[Callable[[Task], int]]]) -> None:
        self.tasks = tasks
        self.worker = worker
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.done = 0

    def run(self) -> None:
        try:
            with self.worker() as work:
                while not self.stop.is_set():
                    with self.lock:
                        task = next(self.tasks, _END)
                    if task is _END:
                        return
                    count = work(task)  # type: ignore[arg-type]
                    with self.lock:
                        self.done += count
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()


_END = object()
