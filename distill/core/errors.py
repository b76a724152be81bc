"""The exceptions that end a command without a traceback, and their exit codes."""

EXIT_FAILED = 1  # the work failed; what was saved is intact
EXIT_INPUT = 2  # invalid input; nothing was written
EXIT_STOPPED = 75  # stopped by a signal after saving; run again to resume (EX_TEMPFAIL)
EXIT_PEER = 76  # this rank lost contact with another rank, which is the cause of the failure
EXIT_INTERRUPTED = 130  # a second Ctrl-C, without saving (128 + SIGINT, as in shells)


class InputError(ValueError):
    """Invalid input from the user. The message says what was given, what is valid and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The work cannot continue (disk full, non-finite loss). The message says what is intact. Exit code 1."""


class Stopped(Exception):  # noqa: N818  (not an error: the run was asked to stop and saved first)
    """The work was stopped by a signal. It was saved first and can be resumed. Exit code 75.

    resume: how to resume, printed after the message; "" if the message says enough.
    """

    def __init__(self, message: str, resume: str = "run the same command again to resume") -> None:
        super().__init__(message)
        self.resume = resume


class PeerLost(Exception):  # noqa: N818  (the error is another rank's)
    """Another rank has ended or hangs. Exit code 76."""
