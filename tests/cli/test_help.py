"""Help that teaches: each command has examples that parse, a line for each option, and --json."""

import os
import shlex
import subprocess
import sys

import pytest
import typer

from autopar.cli import app
from autopar.cli_help import EXAMPLES

ROOT = typer.main.get_command(app)


def commands(group, above: str = "") -> dict[str, object]:
    """All commands by their names, those of groups as "group command"."""
    found = {}
    for name, command in group.commands.items():
        inner = commands(command, f"{above}{name} ") if hasattr(command, "commands") else {f"{above}{name}": command}
        found.update(inner)
    return found


ALL = commands(ROOT)


def test_every_command_has_examples() -> None:
    assert set(ALL) == set(EXAMPLES)


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_the_examples_are_commands(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "autopar"
    group, context = ROOT, ROOT.make_context("autopar", list(words))
    while hasattr(group, "commands"):
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
        group = command
    assert context.params


@pytest.mark.parametrize("name", sorted(ALL))
def test_options_are_explained_and_every_command_has_json(autopar, name: str) -> None:
    run = autopar(*name.split(), "--help")
    assert run.code == 0
    for line in EXAMPLES[name]:
        assert line in run.out
    assert "--json" in run.out
    options = [param for param in ALL[name].params if param.param_type_name == "option" and param.name != "help"]
    assert [param.name for param in options if not param.help] == []


def completed(words: str, count: int) -> list[str]:
    environment = {**os.environ, "_AUTOPAR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    run = subprocess.run([sys.executable, "-m", "autopar"], env=environment, capture_output=True, text=True)
    return run.stdout.split()


def test_the_shell_completes_commands_and_options() -> None:
    assert completed("autopar si", 1) == ["simulate"]
    assert "--global-batch" in completed("autopar plan --glo", 2)
    assert completed("autopar export p.json --to m", 4) == ["megatron"]


def test_the_completion_script_is_printed() -> None:
    environment = {**os.environ, "_AUTOPAR_COMPLETE": "source_bash"}
    run = subprocess.run([sys.executable, "-m", "autopar"], env=environment, capture_output=True, text=True)
    assert "complete" in run.stdout and "_AUTOPAR_COMPLETE=complete_bash" in run.stdout


def test_no_words_at_all_are_the_help(autopar) -> None:
    run = autopar()
    assert run.code == 0
    assert "plan" in run.out and "doctor" in run.out
