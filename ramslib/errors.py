"""The one error a person sees: bad input, told in one line."""


class InputError(ValueError):
    """Bad input from a person or a file.

    The message is one line that says what is wrong, where, and what to do. The command line prints
    it and exits with code 2; notebooks show it as the last line of the traceback.
    """


def one_line(error: BaseException) -> str:
    """An error as one line; errors made for people already are one."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError | OSError) else f"{type(error).__name__}: {text}"
