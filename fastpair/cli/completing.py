"""`completion`: what a shell needs to complete the commands, their options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from fastpair.cli.shared import commands

SHELLS = ("bash", "zsh", "fish")

VARIABLE = "_FASTPAIR_COMPLETE"
"""By which a shell asks for completions; click takes it from the name of the program."""


@commands.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes commands, options, their choices and files."""
    script = get_completion_class(shell)
    assert script is not None  # click knows them all
    click.echo(script(commands, {}, "fastpair", VARIABLE).source())
