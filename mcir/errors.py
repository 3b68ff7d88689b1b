"""The one exception for mistakes that the user can mend: printed as a sentence, without a traceback, exit code 1."""


class UserError(Exception):
    """Says what is wrong, where (field path, file, row) and how to mend it."""
