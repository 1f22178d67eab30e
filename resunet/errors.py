"""What can go wrong that is not our bug.

    ResUNetError             an exit code and one message; never shown with a traceback
    ├── CheckFailed      1   a check said no: verify, leak, gate, non-finite loss
    ├── InputError       2   the user's input is at fault; the message names the key or file, its value,
    │                        what is allowed and what to do next
    ├── EnvironmentFault 3   disk, memory, device, a missing extra
    └── Stopped        143   SIGTERM, 130 after Ctrl-C; what was saved can be resumed

Anything else that reaches the command line is a bug of this project and shows its traceback.
"""


class ResUNetError(Exception):
    exit_code = 1
    known_to_all = False  # of several ranks: it was exchanged, and rank 0 tells it


class CheckFailed(ResUNetError):
    exit_code = 1


class InputError(ResUNetError):
    exit_code = 2


class EnvironmentFault(ResUNetError):
    exit_code = 3


class Stopped(ResUNetError):
    exit_code = 143
