"""The command line: `ireasoner COMMAND`. The commands are the functions that COMMANDS names; each is imported when it
is chosen, and what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError
from pydantic import ValidationError

from ireasoner import __version__
from ireasoner.app.options import shown
from ireasoner.method.types import UsageError

PROGRAM = "ireasoner"
Verbosity = Literal["quiet", "normal", "debug"]

# Each command with the function that it calls, and its line in the list of commands.
COMMANDS = {
    "train": ("train:train", "self-evolve a model on a folder of images"),
    "demo": ("demo:demo", "watch the tiny model improve itself, in minutes, on a CPU"),
    "eval": ("evaluate:evaluate", "held-out accuracy of a run or a model; two are compared on the same questions"),
    "compare": (
        "evaluate:compare",
        "paired tests with intervals over two sample logs of lmms-eval, or two of eval",
    ),
    "ask": ("using:ask", "ask a trained model about an image, several or a clip"),
    "export": ("using:export", "write a trained model as a folder for transformers, PEFT and vLLM"),
    "push": ("using:push", "put a trained model on the hub"),
    "label": ("evaluate:label", "answer a run's own questions yourself, as evaluation data"),
    "ablate": ("study:ablate", "recipes x seeds beside the base and the controls: one table with intervals"),
    "view": ("show:view", "look at runs in the browser, while they go or afterwards"),
    "report": ("show:report", "write that page as one file that can be mailed"),
    "runs": ("show:runs", "list runs with their state and results"),
    "validity": ("study:validity", "test whether step agreement is worth being a reward, without training"),
    "doctor": (
        "examine:doctor",
        "check that this model can be trained correctly on this machine, and can learn from your images",
    ),
    "plan": (
        "plan:plan",
        "say what a run takes on your GPUs, what fits, and what to type, before anything is downloaded",
    ),
    "serve": ("serve:serve", "the command of a vLLM server that samples for a run"),
    "bench": ("study:bench", "time one training step by phases, with and without shared prompts"),
    "playground": ("demo:playground", "write the embedded world's pictures and questions as files"),
}


def build_app(described: Collection[str] = COMMANDS) -> App:
    """The command line. `app[name].assemble_argument_collection()` are the options of a command.

    Args:
        described: commands that `--help` describes by their docstrings and not by their lines in COMMANDS. For the
            docstring, the command is imported.
    """
    app = App(
        name=PROGRAM,
        help="Self-evolving visual reasoning from unlabeled images: a Proposer asks, a Solver answers several times, "
        "and their agreement is the reward.",
        help_epilogue=f"Start with: {PROGRAM} demo",
        help_format="plaintext",
        version=f"{PROGRAM} {__version__}",
        group_parameters=Group.create_default_parameters("Options"),
        default_parameter=Parameter(negative_iterable=(), show_default=shown, allow_repeating=True),
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    for place, (name, (function, line)) in enumerate(COMMANDS.items()):
        described_so = None if name in described else line
        # To find out that sixty options are all optional would take a tenth of the time that this help takes.
        usage = f"{PROGRAM} train [OPTIONS]" if name == "train" else None
        app.command(f"ireasoner.app.{function}", name=name, help=described_so, usage=usage, sort_key=place)

    # `main` says what becomes of a run that is interrupted.
    app.suppress_keyboard_interrupt = app.meta.suppress_keyboard_interrupt = False

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        verbosity: Annotated[Verbosity, Parameter(group=Group.create_ordered("Every command"))] = "normal",
    ) -> int:
        """Run the command that the tokens name.

        Args:
            verbosity: quiet: only results and what needs attention; debug: also what libraries say, and tracebacks.
        """
        from ireasoner.app.display import set_verbosity

        set_verbosity(verbosity)
        return app(tokens)

    return app


def _sentence(error: CycloptsError) -> str:
    """What is wrong with a command line, and where to look."""
    error.verbose = False  # or it would name the function of the package
    text = str(error)
    if isinstance(error.__cause__, ValidationError) and error.argument:  # pydantic's, of a value out of its bounds
        from ireasoner.training.config import problem

        flag = error.argument.tokens[0].keyword or error.argument.name
        text = f"{flag}: {'; '.join(map(problem, error.__cause__.errors()))}"
    elif isinstance(error, UnusedCliTokensError):
        text = f"{' '.join(error.unused_tokens or ())!r} belongs to no option; what is on or off is --NAME or --no-NAME"
    return f"{text[0].lower()}{text[1:]} (see {' '.join([PROGRAM, *(error.command_chain or ())])} --help)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2: a mistake that the user can put right, in one sentence)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words:
            raise UsageError(f"name a command (see {PROGRAM} --help)")
        return build_app(described=words).meta(words) or 0
    except (CycloptsError, UsageError) as error:
        from ireasoner.app.display import plain, verbosity

        if verbosity() == "debug":
            import traceback

            traceback.print_exception(error)
        said = _sentence(error) if isinstance(error, CycloptsError) else str(error)
        rank = os.environ.get("RANK", "0")  # of several processes of one run
        said = plain(said, 2000)  # it may quote a run directory of somebody else
        print(f"{PROGRAM}: {said}" if rank == "0" else f"{PROGRAM}, process {rank}: {said}", file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends with a list of what is in such files
            Path(report).write_text(json.dumps({"message": said, "timestamp": int(time.time())}), "utf-8")
        return 2
    except BrokenPipeError:  # whoever read the output has gone, as in `ireasoner eval … | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a process that a closed pipe has ended
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; nothing saved so far is lost", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
