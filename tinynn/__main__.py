"""`python -m tinynn COMMAND`: what is done from a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from tinynn import profile, warmup
from tinynn.errors import TinynnError
from tinynn.explain import command as explain


class Command(Protocol):
    """What the module of a command has; its docstring is the description in its help."""

    @property
    def SUMMARY(self) -> str:
        """One line for the list of commands."""
        ...

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add its arguments."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Do it; the exit status."""
        ...


COMMANDS: dict[str, Command] = {"warmup": warmup, "profile": profile, "explain": explain}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 after an error, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m tinynn", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, help=command.SUMMARY, description=command.__doc__)
        command.configure(of_command)
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (TinynnError, MemoryError) as error:
        print(f"tinynn: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tinynn: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
