"""Markup of pages: what is not made here is text, and is escaped where it is put in."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from fastpair.plots import Figure, clean


class Html(str):
    """Markup, which is put into a page as it is."""


def markup(value: object) -> Html:
    """Return markup as it is and all else as text."""
    return value if isinstance(value, Html) else Html(html.escape(clean(value)))


def element(name: str, *content: object, **attributes: object) -> Html:
    """Return an element; a trailing "_" of an attribute's name is left out, "_" becomes "-"."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(clean(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{told}>{''.join(markup(one) for one in content)}</{name}>")


def table(
    rows: Sequence[Sequence[object]],
    caption: str,
    numbers: Iterable[int] = (),
    kind: str = "",
    *,
    headed: bool = False,
) -> Html:
    """Return a table in a box that scrolls by itself; the first row and column are headings.

    Parameters
    ----------
    rows : cells; the first row names the columns.
    caption : what the table shows.
    numbers : which columns hold numbers, set to the right.
    kind : class of the table.
    headed : whether a heading above says the same, so that the caption need not be seen.
    """
    right = set(numbers)

    def looks(column: int) -> str | None:
        return "number" if column in right else None

    head = [
        element("th", c, scope="col", class_=looks(n)) if c else element("td")
        for n, c in enumerate(rows[0])
    ]
    body = []
    for row in rows[1:]:
        names = [clean(name) if kind == "pairs" else None for name in rows[0]]
        cells = [element("th", row[0], scope="row", class_=looks(0), data_name=names[0])]
        for n, cell in enumerate(row[1:], 1):
            text = "text" if isinstance(cell, Html) and cell.startswith("<d") else None
            cells.append(element("td", cell, class_=looks(n) or text, data_name=names[n]))
        body.append(element("tr", *cells))
    whole = element(
        "table",
        element("caption", caption, class_="unseen" if headed else None),
        element("thead", element("tr", *head)),
        element("tbody", *body),
        class_=kind or None,
    )
    return element("div", whole, class_="box", tabindex="0", role="region", aria_label=caption)


def shown_figure(figure: Figure, caption: str, kind: str | None = None) -> Html:
    """Return a figure with its caption."""
    return element("figure", Html(figure.svg), element("figcaption", caption), class_=kind)


def tiles(pairs: Iterable[tuple[str, object]]) -> Html:
    """Return numbers in large type with what they are below."""
    parts = [
        element("div", element("b", value), element("span", name), class_="tile")
        for name, value in pairs
    ]
    return element("div", *parts, class_="tiles")


def paragraph(*content: object, kind: str | None = None) -> Html:
    """Return a paragraph."""
    return element("p", *content, class_=kind)


def with_small(cell: str) -> object:
    """Set an interval behind a number in small type."""
    value, bracket, interval = cell.partition(" [")
    if not bracket or not interval.endswith("]"):
        return cell
    return Html(f"{markup(value)} {element('small', f'[{interval}')}")


def json_text(data: Any) -> str:
    """Return JSON that cannot end the element that it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
