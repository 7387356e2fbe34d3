"""The command line: `ireasoner COMMAND`. What each command takes and does stands in `commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ireasoner import __version__
from ireasoner.app.command import Parser, add_command, parsed
from ireasoner.app.commands import COMMANDS, PROGRAM
from ireasoner.app.display import plain, quiet_libraries
from ireasoner.method.types import UsageError

# Options by the names that they have elsewhere in the field.
ALIASES = {
    "--model-name-or-path": "--model",
    "--output-dir": "--out",
    "--max-steps": "--steps",
    "--num-generations": "--group-size",
    "--beta": "--kl-coef",
    "--save-steps": "--save-every",
}


def build_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(
        prog=PROGRAM,
        description="Self-evolving visual reasoning from a folder of unlabeled images: a Proposer asks, a Solver "
        "answers several times, and their agreement is the reward.",
        epilog=f"Start with: {PROGRAM} demo",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        add_command(commands, name, command)
    return parser


def _canonical(argument: str) -> str:
    """An option as the parser knows it: `_` may stand for `-`, and the names of ALIASES do as well."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = name.replace("_", "-")
    return ALIASES.get(name, name) + equals + value


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2: a mistake that the user can put right, in one sentence)."""
    quiet_libraries()
    try:
        given = vars(build_parser().parse_args([_canonical(a) for a in (sys.argv[1:] if argv is None else argv)]))
        return parsed(COMMANDS[given.pop("command")], given).run()
    except UsageError as error:
        rank = os.environ.get("RANK", "0")  # of several processes of one run
        said = plain(str(error), 2000)  # it may quote a run directory of somebody else
        print(f"{PROGRAM}: {said}" if rank == "0" else f"{PROGRAM}, process {rank}: {said}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has gone, as in `ireasoner eval … | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a process that a closed pipe has ended
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; nothing saved so far is lost", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
