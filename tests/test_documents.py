"""What the documents say of the project is so: rooms, commands, links, the version."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import fastpair
from fastpair.cli import commands

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"]

if not (ROOT / "CONTRIBUTING.md").exists():
    pytest.skip("the documents are not beside the tests here", allow_module_level=True)


def sources():
    """Module name -> file."""
    files = {}
    for folder, package in (("fastpair", "fastpair"), ("kernels", "fastpair.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *parts]).removesuffix(".__init__")] = path
    return files


def map_of_rooms():
    """Module name -> its floor, in the order in which CONTRIBUTING.md lists them."""
    by_path = {str(path.relative_to(ROOT)): name for name, path in sources().items()}
    floors, number = [], 0
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if match := re.match(r"\*\*(\d+)\. ", line):
            number = int(match[1])
        elif match := re.match(r"- `(.+\.py)`: ", line):
            floors.append((by_path.get(match[1], match[1]), number))
    return floors


def imported_by(name, path, known):
    """The modules of ours that a file imports when it runs; not what is there for types alone."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [one for one in inside if one in known]
            yield from found if len(found) == len(inside) else [node.module, *found]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_map_has_every_room_once():
    names = [name for name, _ in map_of_rooms()]
    assert sorted(names) == sorted(sources())


def test_a_room_imports_from_its_own_floor_and_those_below():
    files, floors = sources(), dict(map_of_rooms())
    upwards = [
        f"{name} (floor {floors[name]}) imports {other} (floor {floors[other]})"
        for name, path in files.items()
        for other in imported_by(name, path, files)
        if other in floors and other != "fastpair" and floors[other] > floors[name]
    ]
    assert upwards == []


def test_the_readme_names_every_command():
    table = (ROOT / "README.md").read_text()
    for name in commands.commands:
        assert f"`fastpair {name}" in table, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_version_comes_from_one_place():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)
    assert fastpair.__version__ == importlib.metadata.version("fastpair") == version
    printed = CliRunner().invoke(commands, ["--version"]).output
    assert printed == f"fastpair, version {version}\n"
    assert [name for name, path in sources().items() if f'"{version}"' in path.read_text()] == []
