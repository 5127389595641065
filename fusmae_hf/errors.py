"""What a user can do wrong, and what damaged files raise."""


class PairError(Exception):
    """A pair that cannot be read or must not be stored; the message names the file and says what is wrong with it."""


USER_ERRORS = (PairError, ValueError, OSError, ImportError)
"""What a wrong argument or a damaged file raises: shown as one paragraph. Anything else is a bug and shows in full."""
