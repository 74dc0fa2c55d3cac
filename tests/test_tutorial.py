"""The tutorial, copied block by block into a shell by a newcomer, reaches the clusters."""

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"

if not PAGE.exists():
    pytest.skip("the documents are not beside the tests here", allow_module_level=True)


def blocks():
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder after all blocks but the installation; what each of them printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    programs = folder / "programs"
    programs.mkdir()
    run = "import sys; from fastpair.cli import main; sys.exit(main())"
    for name, words in (("python", ""), ("fastpair", f"-c '{run}'")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.chmod(0o755)
    (folder / "work").mkdir()
    path = f"{programs}:{os.environ['PATH']}"
    said = {}
    for block in blocks()[1:]:
        done = subprocess.run(
            ["bash", "-e", "-c", block],
            cwd=folder / "work",
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        said[block] = done.stdout + done.stderr
    return folder / "work", said


def said_by(said, words):
    return next(text for block, text in said.items() if words in block)


def test_the_first_block_installs_and_nothing_else():
    assert blocks()[0] == "pip install fastpair\n"


def test_what_is_learned_ranks_unseen_products_as_the_page_says(folder):
    _, said = folder
    line = next(
        line
        for line in said_by(said, "fastpair evaluate").splitlines()
        if line.startswith("average precision ")
    )
    learned, cosine = (float(number) for number in re.findall(r" (0\.\d{4}) ", line)[:2])
    assert "goes from about 0.61 for the cosine to 0.97" in " ".join(PAGE.read_text().split())
    assert cosine == pytest.approx(0.61, abs=0.02)
    assert learned == pytest.approx(0.97, abs=0.02)


def test_every_listing_ends_in_a_group_and_groups_are_products(folder):
    work, said = folder
    rows = list(csv.DictReader((work / "groups.csv").open()))
    listings = (work / "listings.txt").read_text().splitlines()
    assert [row["id"] for row in rows] == [f"shop{n:04d}" for n in range(len(listings))]
    chains, average = (
        said_by(said, words) for words in ("0 -o groups.csv", "--link average -o groups.csv")
    )
    precision = [float(re.search(r"precision (\d\.\d+)", text)[1]) for text in (chains, average)]
    assert precision[0] < precision[1] == 1.0
    sizes = Counter(row["group"] for row in rows)
    assert 1 < max(sizes.values()) < 15
    assert len(said_by(said, "python show.py").split("\n\n")) >= 3
