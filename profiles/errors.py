"""InputError: input that cannot be used. The command line prints it as one line and exits with
1."""


class InputError(Exception):
    """One line for the user: the value, what was expected, and where it was found."""


def raised_by_us(error: BaseException) -> bool:
    """Whether the line that raised an exception is semmoe's own: a bug, not a mistake of the user
    that another package has found."""
    name, step = "", error.__traceback__
    while step is not None:
        name, step = step.tb_frame.f_globals.get("__name__", ""), step.tb_next
    return name.partition(".")[0] == "semmoe"
