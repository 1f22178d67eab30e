import errno
import os
import signal
from collections.abc import Sequence

import pytest

from resunet.errors import EnvironmentFault, InputError
from resunet.exits import exit_code_of


def raising(error: BaseException):
    def command(arguments: Sequence[str]) -> None:
        raise error

    return command


def test_sigterm_leaves_with_143_wherever_it_arrives(capsys):
    before = signal.getsignal(signal.SIGTERM)
    finished = []

    def command(arguments: Sequence[str]) -> None:
        signal.raise_signal(signal.SIGTERM)
        finished.append(True)

    assert exit_code_of(command, []) == 143 and not finished
    assert capsys.readouterr().err.startswith("resunet: stopped by SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_child_of_a_fork_ends_without_a_word(capfd):
    def command(arguments: Sequence[str]) -> int:
        if (child := os.fork()) == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 143

    assert exit_code_of(command, []) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_disk_that_refuses_is_the_environments_fault(number, capsys):
    assert exit_code_of(raising(OSError(number, "no", "somewhere")), []) == 3
    assert capsys.readouterr().err == "resunet: somewhere: no. Free space, or name another folder.\n"


@pytest.mark.parametrize("error", [InputError("wrong"), EnvironmentFault("broken")])
def test_ranks_that_became_workers_do_not_repeat_what_all_find(error, monkeypatch, capsys):
    """A label curve's processes take their RANK away; what every one of them finds is marked, and rank 0's to tell."""

    def command(arguments: Sequence[str]) -> None:
        monkeypatch.delenv("RANK")
        raise error

    for known in (False, True):
        error.known_to_all = known
        monkeypatch.setenv("RANK", "1")
        assert exit_code_of(command, []) == error.exit_code
        assert bool(capsys.readouterr().err) != known
