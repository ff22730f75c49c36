"""The one exception type that a user is meant to read."""


class TrioError(Exception):
    """Bad input or an unusable environment: says what is wrong and what to do about it.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """
