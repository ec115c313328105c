"""The one error a person sees: bad input, told in one line."""


class InputError(ValueError):
    """Bad input from a person or a file.

    The message is one line that says what is wrong, where, and what to do. The command line prints
    it and exits with code 2; notebooks show it as the last line of the traceback.
    """
