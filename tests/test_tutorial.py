"""The tutorial, copied block by block into a shell by a newcomer, reaches the clusters."""

import csv
import re
from collections import Counter, defaultdict
from itertools import combinations

import pages
import pytest

PAGE = pages.DOCS / "tutorial.md"

if not PAGE.exists():
    pytest.skip("the documents are not beside the tests here", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder after all blocks but the installation; what each of them printed."""
    return pages.ended(PAGE, pages.shared_root(tmp_path_factory))


def said_by(blocks, words):
    return next(block.said for block in blocks if words in block.text)


def test_the_first_block_installs_and_nothing_else():
    first, *others = pages.blocks_of(PAGE)
    assert first.text.splitlines()[1:] == ["pip install fastpair"]
    assert first.reason == "installs packages"
    assert all(block.runs for block in others)


def test_what_is_learned_ranks_unseen_products_as_the_page_says(folder):
    _, blocks = folder
    line = next(
        line
        for line in said_by(blocks, "fastpair evaluate").splitlines()
        if re.match(r"average precision +\d", line)
    )
    learned, cosine = (float(number) for number in re.findall(r" (0\.\d{4}) ", line)[:2])
    assert "goes from about 0.61 for the cosine to 0.97" in " ".join(PAGE.read_text().split())
    assert cosine == pytest.approx(0.61, abs=0.02)
    assert learned == pytest.approx(0.97, abs=0.02)


def test_every_listing_ends_in_a_group_and_groups_are_products(folder):
    work, blocks = folder
    rows = list(csv.DictReader((work / "groups.csv").open()))
    listings = (work / "listings.txt").read_text().splitlines()
    assert [row["id"] for row in rows] == [f"shop{n:04d}" for n in range(len(listings))]
    chains, average = (
        said_by(blocks, words) for words in ("0 -o groups.csv", "--link average -o groups.csv")
    )
    precision = [float(re.search(r"precision (\d\.\d+)", text)[1]) for text in (chains, average)]
    assert precision[0] < precision[1] == 1.0
    sizes = Counter(row["group"] for row in rows)
    assert 1 < max(sizes.values()) < 15
    assert len(said_by(blocks, "python show.py").split("\n\n")) >= 3


def test_what_the_page_says_of_all_groups_is_so(folder, tmp_path, monkeypatch):
    work, _ = folder
    monkeypatch.chdir(tmp_path)  # it writes its files again
    made = {"__name__": "listings"}
    exec((work / "listings.py").read_text(), made)
    products = [row[0] for row in made["rows"]]
    groups = defaultdict(list)
    for row in csv.DictReader((work / "groups.csv").open()):
        groups[row["group"]].append(products[int(row["id"][4:])])
    same = [one == other for group in groups.values() for one, other in combinations(group, 2)]
    assert "over all pairs of all groups it is 0.80" in " ".join(PAGE.read_text().split())
    assert sum(same) / len(same) == pytest.approx(0.80, abs=0.02)
