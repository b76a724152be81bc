"""How a command ends without a traceback: wrong input, failed work, a stop after saving, a lost rank."""

EXIT_FAILED = 1  # the work failed; what was saved is intact
EXIT_INPUT = 2  # the user gave something that cannot work; nothing was written
EXIT_STOPPED = 75  # stopped by a signal after saving; run again to resume (EX_TEMPFAIL)
EXIT_PEER = 76  # a rank that lost contact with another: not the cause
EXIT_INTERRUPTED = 130  # a second Ctrl-C, without saving (128 + SIGINT, as of shells)


class InputError(ValueError):
    """Invalid input from the user: says what was given, what is valid and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The work cannot continue (disk full, non-finite loss): says where, and what is intact. Exit code 1."""


class Stopped(Exception):  # noqa: N818  (not an error: the run was asked to stop and saved first)
    """A signal asked the work to stop; it has saved and can be resumed. Exit code 75."""


class PeerLost(Exception):  # noqa: N818  (the error is another rank's)
    """Another rank is gone or hangs. Exit code 76."""
