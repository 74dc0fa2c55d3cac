"""The pages of the documents: what they run runs, what they show is shown, and all are found."""

import ast
import inspect
import re
import subprocess
import sys

import pages
import pytest

import fastpair
import fastpair.jobs

if not (pages.DOCS / "index.md").exists():
    pytest.skip("the documents are not beside the tests here", allow_module_level=True)

PAGES = sorted(pages.DOCS.glob("**/*.md"))
RUNNING = [page for page in PAGES if any(block.runs for block in pages.blocks_of(page))]


def name(page):
    return str(page.relative_to(pages.DOCS))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return pages.shared_root(tmp_path_factory)


@pytest.mark.parametrize("page", RUNNING, ids=name)
def test_every_block_runs_and_prints_what_the_page_shows(page, root):
    _, blocks = pages.ended(page, root)
    for block in blocks:
        if block.expected is not None:
            missing = pages.differences(block.expected, block.said)
            assert missing == [], f"line {block.line} printed\n{block.said}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_of_known_languages_and_left_out_for_a_known_reason(page):
    for block in pages.blocks_of(page):
        assert block.language in pages.LANGUAGES, f"line {block.line}: {block.language!r}"
        assert block.reason in {None, *pages.REASONS}, f"line {block.line}: {block.reason!r}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_command_hides_in_a_block_that_is_not_run(page):
    """Text blocks may show the shape of a command, with names in capitals, and no command."""
    for block in pages.blocks_of(page):
        for line in block.text.splitlines() if block.language == "text" else ():
            if re.match(r"\s*(\$ )?(fastpair|python|pip) ", line):
                assert re.search(r"\b[A-Z]{4,}\b", line), f"line {block.line}: {line}"
    indented = re.findall(r"^    (?:fastpair|pip|python) .*", without_blocks(page), re.MULTILINE)
    assert indented == []


def without_blocks(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_page_is_in_the_table_of_contents_once():
    index = (pages.DOCS / "index.md").read_text()
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)
    listed = [
        line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")
    ]
    others = [name(page).removesuffix(".md") for page in PAGES if page.name != "index.md"]
    assert sorted(listed) == others


def test_the_reference_has_every_public_function():
    listed = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", reference(), re.MULTILINE)
    assert set(listed) >= {*fastpair.__all__, *fastpair.jobs.__all__}


def reference():
    return (pages.DOCS / "api.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_calls_in_the_text_of_a_page_are_calls_that_functions_take(page):
    for code in re.findall(r"`(fastpair\.\w+\([^`]*\))`", without_blocks(page)):
        call = ast.parse(code, mode="eval").body
        keywords = {word.arg: None for word in call.keywords}
        inspect.signature(getattr(fastpair, call.func.attr)).bind(*call.args, **keywords)


def test_outputs_are_compared_word_by_word_and_number_by_number():
    said = "one 0.97 [0.9, 1.0]\nskipped\n3,000 pairs in 2.5 s, 1.2 Mpairs/s\n"
    assert (
        pages.differences("one 0.98 [0.88, 1.0]\n...\n3000 pairs in 9 s, 40 kpairs/s", said) == []
    )
    assert pages.differences("one 0.70 [0.9, 1.0]", said) == ["one 0.70 [0.9, 1.0]"]
    assert pages.differences("two 0.97 [0.9, 1.0]", said) == ["two 0.97 [0.9, 1.0]"]
    assert pages.differences("skipped\none 0.97 [0.9, 1.0]", said) == ["one 0.97 [0.9, 1.0]"]


def test_a_site_that_loads_something_from_elsewhere_is_refused(tmp_path):
    (tmp_path / "index.html").write_text(
        '<a href="https://example.org">fine</a><link rel="canonical" href="https://example.org">'
        '<img src="_images/here.svg"><style>p {background: url(here.png)}</style>'
    )
    assert offline(tmp_path) == 0
    for markup in (
        '<script src="https://example.org/a.js"></script>',
        '<link rel="stylesheet" href="//example.org/a.css">',
        "<style>@import 'http://example.org/a.css';</style>",
        '<p style="background: url(https://example.org/a.png)">',
    ):
        (tmp_path / "page.html").write_text(markup)
        assert offline(tmp_path) == 1, markup
    (tmp_path / "page.html").unlink()
    (tmp_path / "a.css").write_text('@font-face {src: url("https://example.org/a.woff2")}')
    assert offline(tmp_path) == 1


def offline(folder):
    done = subprocess.run([sys.executable, pages.DOCS / "offline.py", folder], capture_output=True)
    return done.returncode
