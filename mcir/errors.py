"""The one exception for mistakes that the user can mend: printed as a sentence, without a traceback, exit code 1."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Says what is wrong, where (field path, file, row) and how to mend it."""


@contextmanager
def below(field: str) -> Iterator[None]:
    """Errors, which begin with a field, begin with it as one below `field` of the config."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}.{error}") from error
