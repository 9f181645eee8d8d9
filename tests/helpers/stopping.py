"""End a conversion from inside."""

from __future__ import annotations

from collections.abc import Callable


class Stopped(BaseException):
    """Ends a run from inside, as little prepared for as a signal."""


def stop_after(number: int) -> Callable[[int], None]:
    """Return a callback for progress that ends a conversion after so many chunks."""
    left = [number]

    def progress(amount: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped

    return progress
