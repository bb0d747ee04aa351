"""What ends a command with one message and no traceback."""


class UserError(ValueError):
    """Names the option or file, the value found, what is accepted and what to do.

    The command line prints it as one message and exits with code 2, without a traceback.
    """


def of_file(error: OSError) -> str:
    """Return what a user is to be told of an error of the file system."""
    return f"{error}; see to the path, its permissions and the room on its disk"


class ProcessLostError(RuntimeError):
    """Another process of the training has gone: nobody's mistake, and the same command goes on from the newest state.

    The command line prints it as one message and exits with code 1.
    """
