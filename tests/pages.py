"""Pages of the documents, run: every block of a page, in its order, in a folder of its own.

- ``sh`` blocks go to bash; ``python`` blocks share one interpreter until a command comes between
  them. Both work in the page's folder, and the first thing that fails ends the page.
- An ``output`` block holds what the block before it printed: each of its lines is looked for, in
  order. Words must be the same, numbers about the same (training rounds as the processor does), and
  times may be any. A line ``...`` stands for lines that are left out.
- A block whose first line is ``# not run by the tests: REASON`` is left alone; `REASONS` has them.
- A page that goes on with the files of another one says so, and in a comment that is not shown:
  ``<!-- after: tutorial.md -->``.
- ``text`` blocks are neither: formulas, shapes of commands, files.
"""

import atexit
import fcntl
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from preloaded import Preloaded

DOCS = Path(__file__).parents[1] / "docs"
NOT_RUN = "# not run by the tests: "
REASONS = {
    "installs packages",
    "needs a GPU",
    "needs a scheduler that others have started",
    "takes minutes",
}
LANGUAGES = {"sh", "python", "output", "text"}
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
TIME = re.compile(r"\d+(\.\d+)? (s|ms|µs|min|h)\b|\d[\d.]* [kMG]?(pairs|rows)/s")


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    expected: str | None = None
    said: str = ""

    @property
    def reason(self) -> str | None:
        """Why it is not run, or None."""
        first = self.text.partition("\n")[0]
        return first.removeprefix(NOT_RUN) if first.startswith(NOT_RUN) else None

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and self.reason is None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in their order; outputs stand with what printed them."""
    found: list[Block] = []
    text = page.read_text()
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        block = Block(match[1], match[2], text.count("\n", 0, match.start()) + 1)
        if block.language == "output":
            assert found, f"{page.name}: output of nothing in line {block.line}"
            assert found[-1].runs, f"{page.name}: output of nothing in line {block.line}"
            found[-1].expected = block.text
        elif not block.language.startswith("{"):
            found.append(block)
    return found


def followed_by(page: Path) -> Path | None:
    """The page whose files this one takes for granted."""
    names = re.findall(r"^<!-- after: (\S+) -->$", page.read_text(), re.MULTILINE)
    assert len(names) < 2, f"{page.name} follows several pages"
    return DOCS / names[0] if names else None


def programs(root: Path) -> Path:
    """A folder with the commands ``python`` and ``fastpair``, made once in this process."""
    if root not in _PROGRAMS:
        _PROGRAMS[root] = Preloaded(root / f"programs-{os.getpid()}")
        atexit.register(_PROGRAMS[root].close)
    return _PROGRAMS[root].folder


_PROGRAMS: dict[Path, Preloaded] = {}


def shell(command: str, folder: Path, commands: Path) -> str:
    """What bash prints for a command, errors too; it must end well."""
    done = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def python(blocks: list[Block], folder: Path, commands: Path) -> None:
    """Run Python blocks in one interpreter."""
    mark = "--- end of a block ---"
    program = f"print({mark!r}, flush=True)\n".join(block.text for block in blocks)
    (folder / "blocks_of_this_page.py").write_text(program)
    said = shell("python blocks_of_this_page.py", folder, commands)
    (folder / "blocks_of_this_page.py").unlink()
    for block, text in zip(blocks, said.split(mark + "\n"), strict=True):
        block.said = text


def run(blocks: list[Block], folder: Path, commands: Path) -> None:
    """Run the blocks of a page in `folder`; they know then what they printed."""
    running = (block for block in blocks if block.runs)
    for language, group in groupby(running, key=lambda block: block.language):
        if language == "python":
            python(list(group), folder, commands)
        else:
            for block in group:
                block.said = shell(block.text, folder, commands)


def ended(page: Path, root: Path) -> tuple[Path, list[Block]]:
    """The folder that a page leaves, and its blocks with what they printed.

    A page is run once for all processes that share `root`, after the page that it follows.
    """
    place = root / str(page.relative_to(DOCS).with_suffix("")).replace("/", "-")
    place.mkdir(exist_ok=True, parents=True)
    blocks = blocks_of(page)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "said.json").exists():
            shutil.rmtree(place / "work", ignore_errors=True)
            before = followed_by(page)
            if before is None:
                (place / "work").mkdir()
            else:
                shutil.copytree(ended(before, root)[0], place / "work")
            run(blocks, place / "work", programs(root))
            (place / "said.json").write_text(json.dumps([block.said for block in blocks]))
    for block, said in zip(blocks, json.loads((place / "said.json").read_text()), strict=True):
        block.said = said
    return place / "work", blocks


def differences(expected: str, said: str) -> list[str]:
    """Lines of `expected` that `said` does not have, or not in this order."""
    missing, rest = [], said.splitlines()
    for line in expected.splitlines():
        if line.strip() in ("", "..."):
            continue
        place = next((n for n, other in enumerate(rest) if alike(line, other)), None)
        if place is None:
            missing.append(line)
        else:
            rest = rest[place + 1 :]
    return missing


def alike(line: str, other: str) -> bool:
    """Whether two lines have the same words and about the same numbers."""
    line, other = (TIME.sub("TIME", one) for one in (line, other))
    if words(line) != words(other):
        return False
    pairs = zip(numbers(line), numbers(other), strict=True)
    return all(abs(a - b) <= 0.05 + 0.15 * max(abs(a), abs(b)) for a, b in pairs)


def words(line: str) -> list[str]:
    return NUMBER.sub(" # ", line).replace("─", "").split()


def numbers(line: str) -> list[float]:
    return [float(number.replace(",", "").rstrip(".")) for number in NUMBER.findall(line)]


def shared_root(factory) -> Path:
    """Where pages are run: one folder for all processes of pytest-xdist."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pages"
