"""The pool of threads: every task once, the first error, and after Ctrl-C nothing that still runs."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager

import pytest

from blockmerge.streaming.workers import for_each


@pytest.mark.parametrize("threads", [0, 1, 3, 40])
@pytest.mark.parametrize("count", [0, 1, 500])
def test_every_task_is_done_once(threads, count):
    done, seen = [], []

    @contextmanager
    def worker():
        yield lambda task: done.append(task) or 2

    for_each(range(count), worker, threads, 2 * count, lambda now, total: seen.append((now, total)))
    assert sorted(done) == list(range(count))
    assert seen == sorted(seen)
    assert seen[-1] == (2 * count, 2 * count)


@pytest.mark.parametrize("where", ["worker", "task", "tasks", "progress"])
def test_an_error_anywhere_stops_all(where):
    entered, left = [], []

    def fail(here):
        if here == where:
            raise OSError(where)

    def tasks():
        yield from range(10)
        fail("tasks")
        yield from range(10_000)

    @contextmanager
    def worker():
        fail("worker")

        def work(task):
            time.sleep(0.001)
            if task == 5:
                fail("task")
            return 1

        entered.append(threading.get_ident())
        try:
            yield work
        finally:
            left.append(threading.get_ident())

    with pytest.raises(OSError, match=f"^{where}$"):
        for_each(tasks(), worker, 3, 10_010, lambda *_: fail("progress"))
    # A thread that starts late may find that all is over.
    assert sorted(left) == sorted(entered)
    assert where != "worker" or not entered


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.parametrize("times", [1, 3])
def test_after_interrupts_no_thread_is_at_work(times):
    at_work = set()

    @contextmanager
    def worker():
        def work(task):
            at_work.add(threading.get_ident())
            time.sleep(1 if task == 0 else 0.3)  # the first thread is the one that is waited for first
            return 1

        yield work
        at_work.discard(threading.get_ident())

    def interrupt():
        for _ in range(times):
            time.sleep(0.1)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # as Ctrl-C, amid a wait

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            for_each(range(1000), worker, 4, 1000)
        assert not at_work
    finally:
        signal.signal(signal.SIGINT, former)
