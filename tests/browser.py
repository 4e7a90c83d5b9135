"""A real browser without a window, asked over a pipe in the Chrome DevTools Protocol.

https://chromedevtools.github.io/devtools-protocol/ describes the commands.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from itertools import count

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Browser:
    """One page at a time: `open`, then `set`, `ask`, `picture`, `paper`. A context manager."""

    def __init__(self, profile):
        # The browser reads commands from its file 3 and writes answers to its file 4.
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        theirs_in, theirs_out = (fcntl.fcntl(file, fcntl.F_DUPFD, 20) for file in (theirs_in, theirs_out))
        self.process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(theirs_in, 3), os.dup2(theirs_out, 4)),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.commands, self.answers = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        self.numbers, self.session = count(1), None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        self.send("Emulation.setScrollbarsHidden", hidden=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        with contextlib.suppress(OSError, EOFError):
            self.send("Browser.close")
        self.commands.close()
        self.answers.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def send(self, method, **parameters):
        """Carry out a command, and return its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path):
        """Load a page, and wait until it is there."""
        self.send("Page.navigate", url=path.as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def set(self, width, height=900, *, dark=False, media="screen"):
        """The window's size, the colours that the user prefers, and screen or print."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def ask(self, javascript):
        """The value of an expression, as JSON can hold it."""
        found = self.send("Runtime.evaluate", expression=javascript, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, *, whole=True):
        """A PNG of the page."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def paper(self):
        """A PDF of the page, on A4 unless the page says otherwise."""
        self.send("Emulation.setEmulatedMedia", media="", features=[])
        options = {
            "preferCSSPageSize": True,
            "printBackground": False,
            "paperWidth": 8.27,
            "paperHeight": 11.69,
        }
        return base64.b64decode(self.send("Page.printToPDF", **options)["data"])

    def _read(self):
        message = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            if not byte:
                raise EOFError(f"the browser went away after {bytes(message[:200])!r}")
            message += byte
        return json.loads(message)
