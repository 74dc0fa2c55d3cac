"""docs/python.md: every block of it runs, and what it lists is there."""

import re

import pages
import pytest
from test_estimator import EXPECTED

import fastpair

PAGE = pages.DOCS / "python.md"


@pytest.fixture(scope="module")
def page():
    if not PAGE.exists():
        pytest.skip("the page is not beside these tests")
    return PAGE.read_text()


def test_every_block_runs(page, tmp_path_factory):
    _, blocks = pages.ended(PAGE, pages.shared_root(tmp_path_factory))
    assert len([block for block in blocks if block.runs]) > 7
    said = "".join(block.said for block in blocks)
    assert float(said.splitlines()[0]) > 0.85


def test_everything_that_is_exported_is_on_the_page(page):
    for name in fastpair.__all__:
        assert f"`{name}(" in page or f"## {name}" in page, name


def test_the_exceptions_of_scikit_learns_checks_are_those_on_the_page(page):
    listed = set(re.findall(r"\| `(check_\w+)` \|", page))
    assert listed == set(EXPECTED)
