"""``forge-hpc completion``: what a shell offers after ``forge-hpc``, made from the parsers of the commands.

One function serves both shells: zsh has bash's ``compgen`` by ``bashcompinit``. What it found zsh adds itself, since it
has no ``compopt`` to leave out the space after ``key=``.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Iterator

from forge_hpc.commands import COMMANDS
from forge_hpc.config.fields import walk
from forge_hpc.config.schema import Config

SHELLS = ("bash", "zsh")

_SCRIPT = """\
# forge-hpc completion {shell}
{zsh}_forge_hpc() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} offers= keys=
  COMPREPLY=()
  (( COMP_CWORD > 1 )) || command=
  case "$command" in
    '') offers={commands} ;;
{options}
  esac
  case "$command $before" in
{values}
  esac
  if [[ -n $keys && $word == [a-z]* && $word != *[/=]* ]]; then
    COMPREPLY=($(compgen -W {keys} -- "$word"))
    (( ${{#COMPREPLY[@]}} == 0 )) || compopt -o nospace 2>/dev/null
  elif [[ $word == -* || -z $command || $offers != -* ]]; then
    COMPREPLY=($(compgen -W "$offers" -- "$word"))
  fi
}}
{register}"""
"""Where nothing is offered the shell offers files: a run directory, a configuration."""


_BASH = """\
complete -o bashdefault -o default -F _forge_hpc forge-hpc
"""
_ZSH = """\
_forge_hpc_zsh() {
  local -a COMP_WORDS COMPREPLY
  local COMP_CWORD=$((CURRENT - 1))
  COMP_WORDS=("${words[@]}")
  () { setopt localoptions ksharrays shwordsplit; _forge_hpc }
  if (( ${#COMPREPLY} == 0 )); then
    _files
  else
    compadd -S '' -- ${(M)COMPREPLY:#*=}
    compadd -- ${COMPREPLY:#*=}
  fi
}
compdef _forge_hpc_zsh forge-hpc
"""


def completion(shell: str) -> str:
    """The script for one of ``SHELLS``."""
    parsers = {name: _parser(name) for name in COMMANDS}
    values = [line for name, parser in parsers.items() for line in _values(name, parser)]
    options = [_options(name, parser) for name, parser in parsers.items()]
    return _SCRIPT.format(
        shell=shell,
        zsh="autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" * (shell == "zsh"),
        register=_ZSH if shell == "zsh" else _BASH,
        commands=shlex.quote(" ".join(COMMANDS)),
        values="\n".join(values),
        options="\n".join(options),
        keys=shlex.quote(" ".join(f"{key}=" for key, _, _ in walk(Config()))),
    )


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"forge-hpc {name}")
    importlib.import_module(f"forge_hpc.commands.{name}").arguments(parser)
    return parser


def _values(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """What may follow an option: its choices, else a file."""
    for action in parser._actions:
        if action.option_strings and action.nargs != 0:
            cases = "|".join(f"'{name} {option}'" for option in action.option_strings)
            words = " ".join(map(str, action.choices or ()))
            yield f"    {cases}) offers={shlex.quote(words)} keys= ;;"


def _options(name: str, parser: argparse.ArgumentParser) -> str:
    """What a command takes: the choices of its first argument, else its options, and keys of the configuration."""
    first = next((action.choices for action in parser._actions if not action.option_strings), None)
    words = first or [option for action in parser._actions for option in action.option_strings]
    keys = any(action.metavar == "key=value" for action in parser._actions)
    return f"    {name}) offers={shlex.quote(' '.join(map(str, words)))}{' keys=yes' * keys} ;;"
