"""What ends a command with one message and no traceback."""


class UserError(ValueError):
    """Names the option or file, the value found, what is accepted and what to do.

    The command line prints it as one message and exits with code 2, without a traceback.
    """


class ProcessLostError(RuntimeError):
    """Another process of the training has gone: nobody's mistake, and the same command goes on from the newest state.

    The command line prints it as one message and exits with code 1.
    """
