"""Completion: shells get commands, options, choices and files, and nothing heavy is imported."""

import os
import subprocess
import sys

import pytest

from fastpair.cli import commands, words

PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'fastpair'; from fastpair.cli import *"]


def complete(*line, shell="bash"):
    """What a shell is told of the last word of a line: (kind, value) each."""
    environment = {
        **os.environ,
        "_FASTPAIR_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(["fastpair", *line]),
        "COMP_CWORD": {"fish": line[-1]}.get(shell, str(len(line))),
    }
    program = [*PROGRAM[:2], PROGRAM[2] + "; main()"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    separator = "\n" if shell == "zsh" else ","
    if shell == "zsh":
        cells = done.stdout.splitlines()
        return list(zip(cells[::3], cells[1::3], strict=True))
    return [tuple(line.split(separator, 1)) for line in done.stdout.splitlines()]


def values(*line, **more):
    return [value.split("\t")[0] for _, value in complete(*line, **more)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_is_completed(shell):
    assert values("", shell=shell) == sorted(commands.commands)
    assert values("tr", shell=shell) == ["train"]


def test_options_are_completed():
    assert "--head" in values("train", "--")
    assert values("score", "--prob") == ["--probability"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["train", "--head", "cos"], ["cosine"]),
        (["train", "--head", "cosine+abs"], ["cosine+absdiff"]),
        (["train", "--start", ""], list(words.STARTS)),
        (["train", "--preparation", "h"], ["half-whitening"]),
        (["train", "--loss", "cross-entropy+r"], ["cross-entropy+ranking"]),
        (["train", "--calibrate", "i"], ["isotonic"]),
        (["project", "--precision", ""], ["float32", "float16", "bfloat16", "int8"]),
        (["score", "--device", "g"], ["gpu", "gpu:0", "gpu:1", "gpu:0,1"]),
        (["matrix", "--compression", "l"], ["lzf", "lz4"]),
        (["project", "eu"], ["euclidean"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_words_that_options_take_are_completed(line, expected):
    assert values(*line) == expected


@pytest.mark.parametrize(
    "line",
    [
        ["train", "em"],
        ["train", "embeddings.h5", ""],
        ["score", "table.h5", "ca"],
        ["score", "-o", ""],
        ["project", ""],
        ["project", "mod"],
        ["nearest", "model.h5", ""],
        ["evaluate", "model.h5", ""],
        ["bench", "--table", ""],
        ["bench", "--pairs", "c"],
        ["cluster", "sc"],
        ["info", ""],
    ],
)
def test_files_are_completed_where_files_go(line):
    assert [kind for kind, _ in complete(*line)] == ["file"]


def test_the_words_are_those_that_the_program_knows():
    from fastpair.arms import PREPARATIONS
    from fastpair.calibration import CALIBRATIONS
    from fastpair.heads import HEADS
    from fastpair.model import BUILTINS
    from fastpair.objectives import LOSSES
    from fastpair.towers import STARTS, TOWERS

    assert list(HEADS) == list(words.HEADS)
    assert list(TOWERS) == list(words.TOWERS)
    assert list(LOSSES) == [word for word in words.LOSSES if word in LOSSES]
    given = (PREPARATIONS, CALIBRATIONS, BUILTINS, STARTS)
    assert given == (words.PREPARATIONS, words.CALIBRATIONS, words.BUILTINS, words.STARTS)


def test_completion_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['fastpair']\nfrom fastpair.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'numba', 'pyarrow', 'scipy', 'h5py', 'sklearn', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    asked = {"_FASTPAIR_COMPLETE": "bash_complete", "COMP_CWORD": "3"}
    environment = {**os.environ, **asked, "COMP_WORDS": "fastpair train --head cosine+"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plain,cosine+absdiff" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_printed(shell):
    program = [*PROGRAM[:2], PROGRAM[2] + "; main()", "completion", shell]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"_FASTPAIR_COMPLETE={shell}_complete" in done.stdout
