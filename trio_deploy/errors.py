"""The one exception type that a user is meant to read."""


class TrioError(Exception):
    """Bad input or an unusable environment: says what is wrong and what to do about it.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """


class OutOfMemory(TrioError):
    """Memory ran out.

    Attributes:
        stage: what was being done; "" where a runtime raises it, which does not know.
    """

    def __init__(self, message: str, stage: str = "") -> None:
        super().__init__(message)
        self.stage = stage


class NoChoice(TrioError):
    """What a request asks of its answer leaves no token to choose, or is too complex to tell."""


class PromptTooLong(TrioError):
    """A prompt has more tokens than the model's context or a limit holds."""


def shown(value: object) -> str:
    """A value as an error names it: short and at once, whatever it is."""
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, float | bool | None):
        return repr(value)
    if isinstance(value, int) and abs(value) < 1 << 64:
        return str(value)
    return type(value).__name__
