"""Rows of text with quotes, counted: a newline inside quotes ends no row, an empty line is none.

The states are those of the CSV that Arrow reads: a quote opens only at the start of a field, two
quotes inside stand for one, and what follows a closing quote belongs to the field.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

LINE_START, FIELD_START, UNQUOTED, QUOTED, QUOTE_IN_QUOTED = range(5)
"""Where a byte stands: see `count_rows`."""

_NEWLINE, _RETURN, _QUOTE = 10, 13, 34


@functools.cache
def row_counter() -> Callable[..., Any]:
    """Return `count_rows`, compiled: Numba is imported by those alone who meet a quote."""
    from fastpair.kernels.simd import jit

    return jit(count_rows)


def count_rows(text: Any, separator: int, state: Any) -> int:
    """Return how many rows end in these bytes (n,) uint8.

    `separator` is the byte between fields; `state` (1,) int64 is where the last bytes stopped, 0 at
    the beginning, and is left for the next ones.
    """
    now, rows = state[0], 0
    for byte in text:
        if now == QUOTED:
            if byte == _QUOTE:
                now = QUOTE_IN_QUOTED
        elif byte == _QUOTE and now != UNQUOTED:
            now = QUOTED  # a field begins, or a quote is doubled
        elif byte in (_NEWLINE, _RETURN):
            rows += now != LINE_START
            now = LINE_START
        elif byte == separator:
            now = FIELD_START
        else:
            now = UNQUOTED
    state[0] = now
    return rows
