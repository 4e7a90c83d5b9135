"""How bytes move: buffers, the worker pool, writing past the page cache, and tensors as views of buffers."""

from blockmerge.streaming.buffers import aligned_buffer
from blockmerge.streaming.output import PAGE, OutputStream
from blockmerge.streaming.torch_threads import TorchThreads
from blockmerge.streaming.workers import Progress, for_each, processors, thread_count

__all__ = [
    "PAGE",
    "OutputStream",
    "Progress",
    "TorchThreads",
    "aligned_buffer",
    "for_each",
    "processors",
    "thread_count",
]
