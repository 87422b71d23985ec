"""The two ways the engine fails as a whole. A single bad request is never an exception: it is an `error` in its output."""


class UserError(ValueError):
    """A mistake of the user that stops the program: one line that says what was given, what is allowed and what to do.

    Command lines print the line and exit with status 2.
    """


class EngineDeadError(RuntimeError):
    """The engine (or one of its tensor-parallel ranks) died; requests in flight are lost and the engine must be rebuilt.

    Attributes:
        killed: something outside ended it (a rank got SIGKILL or SIGTERM), so that no request is to blame.
        in_step: the request that ends with this error was part of a step that had begun and not ended.
    """

    def __init__(self, message: str, killed: bool = False, in_step: bool = False) -> None:
        super().__init__(message)
        self.killed = killed
        self.in_step = in_step
