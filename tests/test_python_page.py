"""docs/python.md: every block of it runs, and what it lists is there."""

import re
from pathlib import Path

import pytest
from test_estimator import EXPECTED

import fastpair

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.fixture(scope="module")
def page():
    if not PAGE.exists():
        pytest.skip("the page is not beside these tests")
    return PAGE.read_text()


def test_every_block_runs(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) > 7
    names = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number} of python.md", "exec"), names)
    assert float(capsys.readouterr().out.splitlines()[0]) > 0.85


def test_everything_that_is_exported_is_on_the_page(page):
    for name in fastpair.__all__:
        assert f"`{name}(" in page or f"## {name}" in page, name


def test_the_exceptions_of_scikit_learns_checks_are_those_on_the_page(page):
    listed = set(re.findall(r"\| `(check_\w+)` \|", page))
    assert listed == set(EXPECTED)
