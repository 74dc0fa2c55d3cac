"""Whether a release is what its sources say, and works alone: for `make release-check`.

    python tests/release_check.py

The sources are copied twice, under different names and umasks, and built: sdists and wheels must be
equal to the byte, and so must a wheel that is built without the sdist. The wheel is installed alone
into a new environment, where commands run, and the tutorial is followed to its clusters.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pages

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = (
    ("--version",),
    ("bench", "--help"),
    ("completion", "bash"),
    ("demo", "--folder", "demo"),
)
"""What must run from the wheel alone."""


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    """Return what a command prints; one that fails ends the check."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, **more},
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout


def copy_sources(target: Path) -> None:
    """Copy the files that are under version control, with the modes of the umask."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())


def build(folder: Path, umask: int, epoch: str) -> dict[str, str]:
    """Build an sdist, a wheel of it, and a wheel of the sources; return their digests by name."""
    before = os.umask(umask)
    try:
        copy_sources(folder)
        tools = (sys.executable, "-m", "build")
        run(*tools, "--outdir", "dist", ".", cwd=folder, SOURCE_DATE_EPOCH=epoch)
        run(*tools, "--wheel", "--outdir", "direct", ".", cwd=folder, SOURCE_DATE_EPOCH=epoch)
    finally:
        os.umask(before)
    files = sorted([*(folder / "dist").iterdir(), *(folder / "direct").iterdir()])
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def check_builds(work: Path, epoch: str) -> Path:
    """Build in two places and compare; return the wheel."""
    places = (("one", 0o022), ("another place", 0o077))
    found = [build(work / name, umask, epoch) for name, umask in places]
    for name, digest in found[0].items():
        click.echo(f"{digest}  {name}")
    if found[0] != found[1]:
        raise click.ClickException(f"the builds differ: {found[0]}, {found[1]}")
    wheels = {digest for name, digest in found[0].items() if name.endswith(".whl")}
    if len(wheels) != 1:
        raise click.ClickException("the wheel of the sdist is not that of the sources")
    return next((work / "one" / "dist").glob("*.whl"))


def check_wheel(work: Path, wheel: Path) -> None:
    """Install the wheel alone and run commands."""
    run(sys.executable, "-m", "venv", work / "venv", cwd=work)
    python = work / "venv" / "bin" / "python"
    constraints = ("-c", ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "-q", *constraints, wheel, cwd=work)
    run(python, "-m", "pip", "check", cwd=work)
    (work / "empty").mkdir()
    for words in COMMANDS:
        printed = run(python.with_name("fastpair"), *words, cwd=work / "empty")
        click.echo(f"fastpair {' '.join(words)}: {len(printed.splitlines())} lines")
    (work / "tutorial").mkdir()
    follow_tutorial(work / "tutorial", python.parent)


def follow_tutorial(folder: Path, commands: Path) -> None:
    """Copy the tutorial into a shell, block by block; `commands` has python and fastpair."""
    for block in pages.blocks_of(pages.DOCS / "tutorial.md"):
        if block.runs:
            path = f"{commands}:{os.environ['PATH']}"
            run("bash", "-e", "-c", block.text, cwd=folder, PATH=path)
    groups = (folder / "groups.csv").read_text().splitlines()
    click.echo(f"the tutorial: {len(groups) - 1} listings in groups")


@click.command()
@click.option("--builds-only", is_flag=True, help="Do not install the wheel.")
def main(builds_only: bool) -> None:
    """Build twice, compare, install and run."""
    epoch = run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
    work = Path(tempfile.mkdtemp(prefix="fastpair-release-"))
    try:
        wheel = check_builds(work, epoch)
        if not builds_only:
            check_wheel(work, wheel)
    finally:
        shutil.rmtree(work)
    click.echo("equal bytes from equal sources")


if __name__ == "__main__":
    main()
