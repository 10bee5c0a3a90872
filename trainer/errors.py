"""The one exception that a user's mistake raises: its text is the whole message, printed on one line, exit status 2."""


class UserError(Exception):
    """Bad input, configuration or environment. Say what was expected, what was found, where, and the remedy, on one line."""
