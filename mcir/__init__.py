"""Train image-restoration networks against their own history.

`from mcir import SPN, Negatives, Schedule` in a script of your own; `mcir train` for the whole service.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SPN", "Negatives", "Schedule", "__version__"]

if TYPE_CHECKING:
    from mcir.objective.negatives import Negatives, Schedule
    from mcir.objective.spn import SPN


def __getattr__(name: str) -> Any:
    """Import on first use: `mcir --help` must not wait for torch."""
    if name == "SPN":
        from mcir.objective.spn import SPN

        return SPN
    if name in ("Negatives", "Schedule"):
        from mcir.objective import negatives

        return getattr(negatives, name)
    raise AttributeError(f"module 'mcir' has no attribute {name!r}")
