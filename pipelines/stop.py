"""Stop signals: SIGTERM, Ctrl-C and a lost lease end a job in bounded time. `generate.py` runs its jobs inside `StopSignals`.

Python runs a signal's handler in the main thread, when that comes to it, and an exception from there tears down what the
main thread is in: Ray Data kills its actors before they have flushed anything. So a thread hears of a signal at once,
through the wakeup file descriptor, does what must be done before, and only then raises in the main thread. The same thread
sees to it that the process ends even when the main thread hangs, in Ray or in the store.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

END_S = 8.0  # from the first signal to the end of the process, whatever hangs
LAST_S = 1.0  # of it for what must be done even then
SIGNALS = (signal.SIGTERM, signal.SIGINT)
RAISE = signal.SIGUSR1  # sent by this process to its main thread, to raise there; wakes it from system calls
GO_ON = "start the same command again to go on"


class Stopped(BaseException):
    """SIGTERM or Ctrl-C. Not an `Exception`, so that nothing on the way swallows it."""


class StopSignals:
    """Context manager. SIGTERM and SIGINT raise `Stopped` in the main thread, once; a second signal ends the process.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        error: what is raised.
        before: called by a thread before `error` is raised.
        at_the_end: called by a thread where the process has to be ended; it gets `LAST_S`.
    """

    def __init__(self, status: int, end_s: float = END_S) -> None:
        """Args: `status` is the exit status where the process has to be ended, `end_s` after the first signal."""
        self.error: BaseException = Stopped()
        self.before: Callable[[], None] = lambda: None
        self.at_the_end: Callable[[], None] = lambda: None
        self._status = status
        self._end_s = end_s
        self._main = threading.get_ident()
        self._active = threading.current_thread() is threading.main_thread()
        self._open = False
        self._due = False
        self._lock = threading.Lock()

    def __enter__(self) -> StopSignals:
        """Set the handlers, and start the thread that sees to the end."""
        if self._active:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._handlers_before = {number: signal.getsignal(number) for number in (*SIGNALS, RAISE)}
            self._open = True
            self.install()
            threading.Thread(target=self._watch, name="stop", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Set the handlers there were before."""
        self.finish()
        if self._active:
            for number, handler in self._handlers_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._fd_before)
            self._writer.close()

    def install(self) -> None:
        """Set the handlers, again where something else has set its own."""
        if self._active:
            for number in (*SIGNALS, RAISE):
                signal.signal(number, self._handle)

    def interrupt(self, error: BaseException) -> None:
        """Raise `error` in the main thread at once, from any thread; from then on it is as after a signal."""
        self.error = error
        self._raise()

    def finish(self) -> None:
        """Raise no more: what follows is short and should not be torn. The limits stay."""
        with self._lock:
            self._open = False

    def _raise(self) -> None:
        with self._lock:
            if self._open and not self._due:
                self._due = True
                signal.pthread_kill(self._main, RAISE)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == RAISE and self._due and self._open:
            self._open = False
            self.install()  # what has set its own would run next, for the same signal, and raise again
            raise self.error

    def _watch(self) -> None:
        """Thread: from the first signal on, see that the main thread ends the process, or end it."""
        with contextlib.suppress(OSError), self._reader:
            if not self._heard({*SIGNALS, RAISE}):
                return
            deadline = time.monotonic() + self._end_s - LAST_S
            threading.Thread(target=self._prepare, name="stop-before", daemon=True).start()
            try:
                if self._heard(set(SIGNALS), deadline):
                    self._end("stopped at once")
            except TimeoutError:
                last = threading.Thread(target=self.at_the_end, name="stop-last", daemon=True)
                last.start()
                last.join(LAST_S)
                self._end(f"stopped, though not everything answered within {self._end_s:g} s")

    def _prepare(self) -> None:
        try:
            if not self._due:
                self.before()
        finally:
            self._raise()

    def _heard(self, numbers: set[int], deadline: float | None = None) -> bool:
        """Wait for one of these signals; False when the context has ended.

        Raises:
            TimeoutError: none came in time.
        """
        while True:
            if deadline is not None:
                self._reader.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._reader.recv(1)
            if not data or data[0] in numbers:
                return bool(data)

    def _end(self, how: str) -> None:
        line = f"{how}; {GO_ON}" if isinstance(self.error, Stopped) else f"{self.error} ({how})"
        os.write(2, f"error: {line}\n".encode())  # not through sys.stderr, whose lock the main thread may hold
        os._exit(self._status)
