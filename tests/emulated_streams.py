"""What an emulated GPU is asked for, in order: its streams, events, and copies that come late.

The work of a stream is numbered. What is known to come first is {stream: number of its last work}, for a
stream that waits for others as for an event.
"""

from __future__ import annotations

import ctypes

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_RUBBISH = 0xA5


class LateCopyError(AssertionError):
    """Memory was changed, read or freed while a copy or another stream's work was under way."""


class OrderError(AssertionError):
    """A stream uses what another has written, and does not wait for it."""


class Place:
    """Memory on a device: the stream that it was made on, and the one that wrote last, with that work's number."""

    def __init__(self, storage, device, stream):
        self.held, self.nbytes = StorageWeakRef(storage), storage.nbytes()
        self.device, self.made_on = device, stream
        self.kept_for = {stream}
        self.is_written(stream)

    def is_written(self, stream):
        self.writer, self.written = stream, stream.ask()


class Stream(torch.Stream):
    """What has been asked of a device, in order. torch itself only looks at its class."""

    def __new__(cls, gpu, index):
        return super().__new__(cls, stream_id=len(gpu.streams), device_index=index, device_type=1)

    def __init__(self, gpu, index):
        self.gpu, self._device = gpu, torch.device(gpu.kind, index)
        self._asked = self._done = 0
        self._first = {}
        self._copies, self._used = [], set()
        gpu.streams.append(self)

    @property
    def device(self):
        return self._device

    def ask(self):
        """The number of the next work."""
        self._asked += 1
        return self._asked

    def add(self, copy):
        """A copy that comes late."""
        with self.gpu.lock:
            self._copies.append((self.ask(), copy))

    def use(self, place):
        """Note that work of this stream needs memory that may have been made or written on another."""
        writer = place.writer
        if writer is not self and place.written > max(writer._done, self._first.get(writer, 0)):
            raise OrderError("memory that another stream writes is used without waiting for that")
        if self not in place.kept_for:
            self._used.add(place)

    def record(self, place):
        """Keep memory till all is done that this is asked for before it is freed."""
        place.kept_for.add(self)
        self._used.discard(place)

    def known(self):
        """What is done when all of this is."""
        return {**self._first, self: self._asked}

    def finish(self):
        """Let all that was asked of it be done."""
        _finish(self.known())

    def finish_own(self, number):
        with self.gpu.lock:
            due = [copy for at, copy in self._copies if at <= number]
            self._copies = [(at, copy) for at, copy in self._copies if at > number]
            self._done = max(self._done, number)
            used = set(self._used) if number == self._asked else set()
            self._used -= used
        for copy in due:
            copy.finish()
        _check_held(used)

    def follow(self, known):
        """What is asked from now on comes after that."""
        for other, number in known.items():
            self._first[other] = max(number, self._first.get(other, 0))
            # Memory of this stream is given out again after it, too.
            ours = {place for place in other._used if place.made_on is self and number == other._asked}
            other._used -= ours
            _check_held(ours)

    def synchronize(self):
        self.gpu.waits.append("Stream.synchronize")
        self.finish()

    def wait_stream(self, other):
        self.follow(other.known())

    def wait_event(self, event):
        self.follow(event.known)

    def record_event(self, event=None):
        event = event or Event(self.gpu)
        event.record(self)
        return event


class Event:
    """What a stream had been asked for when it was recorded."""

    def __init__(self, gpu):
        self.gpu, self.known = gpu, {}

    def record(self, stream=None):
        self.known = (stream or torch.cuda.current_stream()).known()

    def wait(self, stream=None):
        (stream or torch.cuda.current_stream()).wait_event(self)

    def synchronize(self):
        self.gpu.waits.append("Event.synchronize")
        _finish(self.known)


def _finish(known):
    for stream, number in known.items():
        stream.finish_own(number)


def _check_held(places):
    if any(place.held.expired() for place in places):
        raise LateCopyError("memory was freed while another stream used it")


class _Late:
    """A copy under way to or from page-locked memory, of which only the place is held."""

    def __init__(self, tensor, locked):
        self._locked, self._at, self._nbytes = locked, tensor.data_ptr(), tensor.nbytes

    def _bytes(self):
        if self._locked.expired():
            raise LateCopyError("page-locked memory was freed while a copy was under way")
        return ctypes.string_at(self._at, self._nbytes)


class Sent(_Late):
    """A copy to the device, under way."""

    def __init__(self, source, locked):
        super().__init__(source, locked)
        self._was = self._bytes()

    def finish(self):
        if self._bytes() != self._was:
            raise LateCopyError("page-locked memory was changed while it was copied to the device")


class Fetched(_Late):
    """A copy from the device, under way: its target holds rubbish."""

    def __init__(self, target, source, locked):
        super().__init__(target, locked)
        target.copy_(source)
        self._values = self._bytes()
        ctypes.memset(self._at, _RUBBISH, self._nbytes)

    def finish(self):
        if self._bytes() != bytes([_RUBBISH]) * self._nbytes:
            raise LateCopyError("page-locked memory was changed while it was copied from the device")
        ctypes.memmove(self._at, self._values, self._nbytes)
