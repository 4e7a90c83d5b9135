"""Making torch single-threaded in workers, which are the threads themselves, and undoing it afterwards."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_saved: list[int] = []
"""torch's number of threads before the first of the jobs that are under way, and once more for each of
them.
"""


class TorchThreads:
    """One job's claim on torch. Jobs may run at the same time; the last one to end puts things back."""

    def __init__(self) -> None:
        self._claimed = False

    def single_here(self, count: int = 1) -> None:
        """Make torch single-threaded, or use `count` threads, in the calling thread."""
        import torch

        with _lock:
            if not self._claimed:
                self._claimed = True
                if not _saved:
                    _saved.append(torch.get_num_threads())
                _saved.append(_saved[0])
            torch.set_num_threads(count)

    def restore(self) -> None:
        """Undo what `single_here` does to threads that are started later."""
        if self._claimed:
            import torch

            with _lock:
                torch.set_num_threads(_saved.pop())
                if len(_saved) == 1:
                    _saved.clear()
