"""How a training ends before its last step: by SIGTERM or Ctrl-C, saved, or by an error, noted."""

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from resunet.errors import EnvironmentFault, Stopped
from resunet.progress import say
from resunet.runs import Run, disk_faults


class StopRequest:
    """Becomes true when SIGTERM or Ctrl-C arrives; the loop saves and leaves at its next step. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before = {one: signal.signal(one, self._receive) for one in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, signum: int, frame: types.FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._received is not None:
                raise KeyboardInterrupt
            say("stopping after this step; Ctrl-C again does not wait for what is saved")
        self._received = signal.Signals(signum)

    def release(self) -> None:
        """After the last step: what is left can be done again, and signals end the process as they do elsewhere."""
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def __bool__(self) -> bool:
        return self._received is not None

    def stop(self, run: Run, step: int) -> None:
        """Close the run and leave with 143, after Ctrl-C with 130.

        Raises:
            Stopped: always.
        """
        run.finish("stopped", step=step)
        received = self._received or signal.SIGTERM  # by which another rank was stopped
        by = "Ctrl-C" if received == signal.SIGINT else "SIGTERM"
        stopped = Stopped(f"stopped by {by} after step {step}; continue with resume=true")
        stopped.exit_code = 128 + received
        raise stopped


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C set the request; the handlers before are restored at the end."""
    request = StopRequest()
    try:
        yield request
    finally:
        request.release()


@contextmanager
def failing_as(run: Run) -> Iterator[None]:
    """Whatever leaves the block as an error leaves the run as failed; a stopped run stays stopped."""
    try:
        with disk_faults(run.folder):
            yield
    except (Stopped, KeyboardInterrupt):
        run.finish("stopped")
        raise
    except BaseException:
        with suppress(OSError, EnvironmentFault):  # a full disk must not hide what went wrong
            run.finish("failed")
        raise
