"""Help: each command has a sentence and examples, its lines fit, and its examples are accepted."""

import shlex

import click
import pytest
from click.testing import CliRunner

from fastpair.cli import commands
from fastpair.cli.examples import EXAMPLES

WIDTH = 80


def help_of(*words):
    done = CliRunner().invoke(commands, [*words, "--help"], terminal_width=WIDTH)
    assert done.exit_code == 0
    return done.output


def called(line):
    """The arguments of fastpair in a line of a shell."""
    line = line.removeprefix('eval "$(').removesuffix(')"').partition(" > ")[0]
    words = shlex.split(line)
    assert words[0] == "fastpair"
    return words[1:]


def test_every_command_has_two_to_four_examples():
    assert EXAMPLES.keys() == commands.commands.keys()
    assert {len(examples) for examples in EXAMPLES.values()} <= {2, 3, 4}


@pytest.mark.parametrize("name", commands.commands)
def test_the_help_of_a_command_begins_with_a_sentence_and_ends_with_examples(name):
    shown = help_of(name)
    first = commands.commands[name].help.split("\n\n")[0]
    assert first.strip().endswith(".")
    assert " ".join(first.split()) in " ".join(shown.split())
    lines = shown.rstrip().splitlines()
    shown_examples = lines[lines.index("Examples:") + 1 :]
    expected = [f"  {line}" for words, one in EXAMPLES[name] for line in (f"# {words}", one)]
    assert [line for line in shown_examples if line] == expected


@pytest.mark.parametrize("name", [None, *commands.commands])
def test_help_fits_a_terminal_of_80_columns(name):
    shown = help_of(*([] if name is None else [name]))
    assert [line for line in shown.splitlines() if len(line) > WIDTH] == []


@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, examples in EXAMPLES.items() for _, line in examples],
)
def test_an_example_is_accepted(name, line):
    words = called(line)
    assert words[0] == name
    command = commands.commands[name]
    context = command.make_context(name, words[1:])
    assert context.params.keys() == {
        one.name for one in command.params if one.expose_value and one.name != "help"
    }


def test_an_example_with_a_wrong_option_would_be_refused():
    with pytest.raises(click.NoSuchOption):
        commands.commands["score"].make_context("score", called("fastpair score --treshold 1")[1:])
