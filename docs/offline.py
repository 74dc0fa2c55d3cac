"""Refuse a built site that loads anything from elsewhere: python docs/offline.py build/docs.

A link may lead anywhere; what a page needs for itself (scripts, styles, fonts, images) lies
beside it.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LINKS = {"a", "area"}
OUTSIDE = re.compile(r"\s*(?:https?:|ftp:|wss?:)?//", re.IGNORECASE)


class Resources(HTMLParser):
    """The addresses that a page loads by itself."""

    def __init__(self):
        super().__init__()
        self.found, self._style = [], False

    def handle_starttag(self, tag, attributes):
        """Note addresses of all tags but links; of a `link` those that are not mere relations."""
        self._style = tag == "style"
        given = dict(attributes)
        if tag in LINKS or (tag == "link" and given.get("rel") in {"canonical", "license"}):
            return
        for name in ("src", "href", "data", "poster", "srcset", "action"):
            if given.get(name):
                self.found.append(given[name])
        self.found += in_style(given.get("style") or "")

    def handle_data(self, data):
        """Note addresses in style sheets within the page."""
        if self._style:
            self.found += in_style(data)


def in_style(text):
    """Addresses that a style sheet loads."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
    return [one or other for one, other in found]


def outside(folder):
    """Return (file, address) of everything in `folder` that comes from elsewhere."""
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in {".html", ".svg"}:
            page = Resources()
            page.feed(path.read_text())
            addresses = page.found
        elif path.suffix == ".css":
            addresses = in_style(path.read_text())
        elif path.suffix == ".js":  # modules and requests of scripts; comments may name anything
            addresses = re.findall(
                r"(?:import\s*\(?|from|fetch\(|importScripts\()\s*['\"]([^'\"]+)", path.read_text()
            )
        else:
            continue
        found += [(path, address) for address in addresses if OUTSIDE.match(address)]
    return found


if __name__ == "__main__":
    loaded = outside(sys.argv[1])
    for path, address in loaded:
        print(f"{path} loads {address}")
    sys.exit(1 if loaded or not list(Path(sys.argv[1]).glob("index.html")) else 0)
