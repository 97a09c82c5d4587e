"""The one exception for what the person at the keyboard can mend."""


class UserError(Exception):
    """One sentence that names the thing and the way out; the scripts print it and exit with 1."""
