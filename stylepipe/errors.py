"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Names the option or file, the value found, what is accepted and what to do.

    The command line prints it as one message and exits with code 2, without a traceback.
    """
