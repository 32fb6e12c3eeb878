"""InputError: input that cannot be used. The command line prints it as one line and exits with
1."""


class InputError(Exception):
    """One line for the user: the value, what was expected, and where it was found."""
