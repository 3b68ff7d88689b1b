"""An undecoded sample, and what every format is read as: units of known length."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from imagecodecs import zlibng_crc32

from mcir.data.files import LeftOut
from mcir.errors import UserError


@dataclass(frozen=True)
class Row:
    """One undecoded sample. `where` names it in messages."""

    key: str
    clean: bytes | memoryview
    degraded: bytes | memoryview | None
    where: str
    extra: Mapping[str, bytes | memoryview] = field(default_factory=dict)
    """Images of further columns, of the clean image's size, by their names."""


@dataclass(frozen=True)
class Units:
    """`lengths[u]` rows in unit u; `rows(u, start)` yields them from row `start` on, in place of an unreadable one an
    error. Worker processes get a copy."""

    lengths: tuple[int, ...]
    rows: Callable[[int, int], Iterator[Row | UserError]]
    left_out: LeftOut = field(default_factory=LeftOut)
    """Files and members that take no part, and why."""

    def __iter__(self) -> Iterator[Row]:
        """All rows. UserError at the first that cannot be read."""
        for unit in range(len(self.lengths)):
            for row in self.rows(unit, 0):
                if isinstance(row, UserError):
                    raise row
                yield row


def checksum(rows: Iterable[Row]) -> int:
    """CRC-32 of the keys and images, one after the other."""
    value = 0
    for row in rows:
        for data in (row.key.encode(), row.clean, row.degraded or b""):
            value = zlibng_crc32(data, value)  # type: ignore[arg-type]  # any buffer
    return value
