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
"""Called as ``progress(done, total)``, in bytes, always from the thread that started the work."""

Task = TypeVar("Task")

_MOST_THREADS = 64
_POLL = 0.05  # seconds between two looks at the progress


def thread_count(threads: int | None) -> int:
    """Return how many threads to use when `threads` are asked for.

    Raises RecipeError for what is no count.
    """
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, Integral) or threads < 1:
        raise RecipeError(f"'{shown(threads)}' is not a number of threads: a whole number from 1 up")
    return min(int(threads), _MOST_THREADS)


def default_threads() -> int:
    """Twice the processors, since half of the workers wait for the disk; never more than 8, which keeps
    memory small.
    """
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
    """Do all `tasks` on `threads` threads, or one at least.

    `worker()` is entered once in each thread and gives the function that does one task and returns its bytes.
    The first error stops all threads and is raised here; so does an exception in this thread, such as Ctrl-C.
    When this returns or raises, no thread is running any more.
    """
    pool = _Pool(iter(tasks), worker)
    running = [
        threading.Thread(target=pool.run, name=f"blockmerge-{number}", daemon=True)
        for number in range(max(1, threads))
    ]
    try:
        for thread in running:
            thread.start()
        while pool.running or not pool.over:
            pool.sleep()
            if progress:
                progress(pool.done, total)
    finally:
        pool.end()
        for thread in running:
            if thread.ident is not None:
                thread.join()
    if pool.error is not None:
        raise pool.error
    if progress:
        progress(total, total)


class _Pool(Generic[Task]):
    """What the threads share.

    They are counted here, as Python takes a thread whose `join` Ctrl-C interrupts for ended.
    """

    def __init__(
        self, tasks: Iterator[Task], worker: Callable[[], AbstractContextManager[Callable[[Task], int]]]
    ) -> None:
        self.tasks = tasks
        self.worker = worker
        self.lock = threading.Lock()  # not a Condition or an Event: Ctrl-C can leave theirs locked
        self.last_ended = threading.Lock()
        self.last_ended.acquire()
        self.over = False  # no task is to be begun any more
        self.running = 0
        self.error: BaseException | None = None  # the first: others would hold what their functions had
        self.done = 0

    def run(self) -> None:
        with self.lock:
            if self.over:
                return
            self.running += 1
        try:
            with self.worker() as work:
                while (task := self._next()) is not _END:
                    count = work(task)  # type: ignore[arg-type]
                    with self.lock:
                        self.done += count
        except BaseException as error:
            with self.lock:
                self.error = error if self.error is None else self.error
        finally:
            with self.lock:
                self.over = True
                self.running -= 1
                if not self.running and self.last_ended.locked():
                    self.last_ended.release()

    def _next(self) -> Task | object:
        with self.lock:
            return _END if self.over else next(self.tasks, _END)

    def sleep(self) -> None:
        """Wait for a moment, or until no thread runs: an unlimited wait cannot be interrupted on every
        system.
        """
        self.last_ended.acquire(timeout=_POLL)

    def end(self) -> None:
        """Wait for all threads, whatever happens meanwhile: a second Ctrl-C is raised when they have
        ended.
        """
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                with self.lock:
                    self.over = True
                    if not self.running:
                        break
                self.sleep()
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


_END = object()
