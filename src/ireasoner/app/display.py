"""What a person sees in the terminal: one steady live display, or plain lines where output is not a terminal."""

from __future__ import annotations

import os
import sys
import textwrap
import webbrowser
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ireasoner.method.recipe import REWARD, paid_rewards
from ireasoner.method.types import Episode, Sampled
from ireasoner.training.config import Config
from ireasoner.training.statistics import MEASURES, READABLE

if TYPE_CHECKING:  # most of these import torch
    from ireasoner.studies.compare import Comparison
    from ireasoner.studies.doctor import Finding
    from ireasoner.training.evaluation import Scores
    from ireasoner.training.state import Observer

SHOWN = {
    f"{REWARD}total": "reward",
    "reward/proposer/total": "proposer",
    "answers/majority_fraction": "majority",
    "answers/answer_entropy": "answer entropy",
    "kl/solver": "KL",
    "well_formed/solver": "well-formed",
}
WIDE = 300  # characters of a text that are shown where all of it is in a file
OTHER_ROWS = {
    "answer_entropy": "entropy",
    "tokens": "tokens",
    "step_truth": "true steps",
    "checkable_steps": "checkable",
}


_verbosity = "normal"


def verbosity() -> str:
    """How much is said. "quiet": only results and what needs attention; "normal": progress too; "debug": what libraries
    say, and tracebacks too."""
    return _verbosity


def set_verbosity(chosen: str) -> None:
    """Choose how much is said from now on; before transformers is imported."""
    global _verbosity
    _verbosity = chosen
    if chosen != "debug":
        quiet_libraries()


def quiet_libraries() -> None:
    """Silence libraries' own progress bars and advice, which would break the display; their errors stay.

    To be called before transformers is imported; who has set one of these variables has the last word.
    """
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
    }
    os.environ.update({**quiet, **os.environ})


def plain(text: str, limit: int = 120) -> str:
    """A model's text, safe to print: one line, no control characters, cut at `limit`."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def as_progress() -> Iterator[None]:
    """What is printed inside is progress, and goes nowhere if only results are asked for."""
    if verbosity() != "quiet":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def open_on_desktop(address: str) -> None:
    """Open an address in the browser or viewer. Where there is no desktop, one would start in this very terminal."""
    if sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        webbrowser.open(address)


def vote_line(episode: Episode) -> str:
    """An episode in one line: image, question, and how the group voted."""
    if not episode.trajectories:
        return plain(f"{episode.image}: unreadable question ({episode.question.problem})")
    return f"{plain(episode.image, 30)}: {plain(episode.question.text, 80)} -> {_tally(episode)}"


def print_episode(episode: Episode, config: Config) -> None:
    """What the model wrote about an image, how each text was read, how the group voted, and what it was paid."""
    question, proposal, sampling = episode.question, episode.proposal, config.sampling
    print_text(f"\n{plain(episode.image)}")
    print_text(f"  question: {plain(question.text if question.well_formed else f'not read: {question.problem}', WIDE)}")
    if proposal is not None:
        print_text(f"    {_length(proposal, sampling.max_question_tokens)}; reward {episode.proposer_reward:.3f}")
        print_text(f"    text: {plain(proposal.text, WIDE)}")
    if episode.trajectories:
        print_text(f"  vote: {_tally(episode)}")
    for number, t in enumerate(episode.trajectories, 1):
        read = f"answer {plain(t.answer or '', 60)} (compared as {plain(t.answer_key or '', 60)})"
        print_text(f"  solution {number}: {read if t.well_formed else plain(f'not read: {t.problem}')}")
        print_text(f"    {_length(t, sampling.max_solution_tokens)}; reward {t.reward:.3f}")
        if t.reasoning_steps:
            steps = " | ".join(plain(step, 80) for step in t.reasoning_steps)
            print_text(f"    reasoning steps: {len(t.reasoning_steps)}: {plain(steps, WIDE)}")
        print_text(f"    text: {plain(t.text, WIDE)}")


def _verdict(run_dir: Path) -> str:
    """What the page would say of a finished run."""
    from ireasoner.page.run import RecordedRun
    from ireasoner.page.verdict import verdict

    return verdict(RecordedRun.open(run_dir)).sentence


def _length(written: Sampled, limit: int) -> str:
    end = "ended by itself" if written.finish_reason == "stop" else "cut off"
    return f"{written.num_tokens} of {limit} tokens, {end}"


def _tally(episode: Episode) -> str:
    votes = Counter(t.answer if t.answer is not None else "(unreadable)" for t in episode.trajectories)
    return ", ".join(f"{plain(answer, 24)} x{count}" for answer, count in votes.most_common())


class Output(Console):
    """A terminal or a file. A run that takes hours must not end because nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        """Go on without output, as after `ireasoner train … | head -1`; by default, rich would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("ireasoner: standard output was closed; the run goes on and records what it does", file=sys.stderr)


class Display:
    """Shows a run while it goes; a context manager. Progress, time left, and what is being learned."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out = config, out
        self.console = Output(highlight=False)
        steady = self.console.is_terminal and verbosity() != "quiet"
        self.live = Live(console=self.console, refresh_per_second=4, transient=True) if steady else None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self.task = self.progress.add_task("training", total=config.schedule.steps, left="")
        self.steps_taken, self.seconds_taken = 0, 0.0

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def observer(self) -> Observer:
        """The callbacks that `train` takes; with `--verbosity quiet`, only what is said once and for a reason."""
        from ireasoner.training.state import Observer

        if verbosity() == "quiet":
            return Observer(on_message=self.say, verdict=_verdict)
        return Observer(self.on_start, self.on_step, self.on_evaluation, self.say, _verdict)

    def say(self, message: str) -> None:
        """One line that stays."""
        self.console.print(Text(plain(message, 2000)), soft_wrap=self.live is None)

    def on_start(self, config: Config, first_step: int) -> None:
        self.config = config  # an extended run has a later last step
        self.progress.update(self.task, completed=first_step - 1, total=config.schedule.steps)
        self.say(
            f"{config.model} on {config.images}: recipe {config.recipe.title}, preset {config.preset}, "
            f"seed {config.seed}, {config.schedule.steps} steps of {config.schedule.images_per_step} images x "
            f"{config.sampling.group_size} trajectories -> {self.out}"
        )

    def on_evaluation(self, which: str, done: int, total: int) -> None:
        if self.live:
            self.progress.update(self.task, description=f"evaluating {which}: {done}/{total}")
            self.live.update(self.progress)
        elif done == total:
            self.say(f"evaluated {which}: {total} held-out questions")

    def on_step(self, step: int, metrics: Mapping[str, float], episodes: Sequence[Episode]) -> None:
        rewards = paid_rewards(metrics, self.config.recipe)
        labels = {name: name.rpartition("/")[2].replace("_", " ") for name in rewards} | SHOWN
        numbers = "  ".join(f"{label} {metrics[name]:.3f}" for name, label in labels.items() if name in metrics)
        seconds = metrics.get("time/step_seconds", 0.0)
        if seconds:
            numbers += f"  {sum(len(e.trajectories) for e in episodes) / seconds:.3g} trajectories/s"
        left = self._time_left(step, seconds)
        if self.live:
            self.progress.update(self.task, completed=step, description="training", left=left)
            lines = [Text(vote_line(episode), no_wrap=True, overflow="ellipsis") for episode in episodes[:4]]
            self.live.update(Group(self.progress, Text(numbers), *lines))
            return
        self.say(f"step {step}/{self.config.schedule.steps}  {numbers}  {seconds:.1f} s, {left}")
        if step % 5 == 1:
            self.say(f"    {vote_line(episodes[0])}")

    def _time_left(self, step: int, seconds: float) -> str:
        """By the mean of the steps so far: rich's own estimate needs two of them within half a minute."""
        self.steps_taken, self.seconds_taken = self.steps_taken + 1, self.seconds_taken + seconds
        rest = self.seconds_taken / self.steps_taken * (self.config.schedule.steps - step)
        return f"{timedelta(seconds=round(rest))} left"


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Rows of text, the first one being the heads; in narrow terminals, of two lines each."""
    console = Console(highlight=False)
    wide = _text_table(title, rows, 1)
    needed = console.measure(wide, options=console.options.update(width=500)).maximum
    if needed <= console.width or not console.is_terminal:
        console.print(wide, width=None if console.is_terminal else 200)
        return
    heads = [head.replace(" ", "\n").replace("-", "-\n") for head in rows[0]]
    console.print(_text_table(title, [heads, *([row[0], *map(_two_lines, row[1:])] for row in rows[1:])], 0))


def print_finding(finding: Finding) -> None:
    """One check of the doctor: its verdict, its name, and its figure below."""
    verdict = Text("ok  ", "bold green") if finding.passed else Text("FAIL", "bold red")
    console = Console(highlight=False)
    console.print(verdict + Text(f"  {finding.name}", "bold"))
    console.print(Text(f"      {plain(finding.figure, 1000)}"), soft_wrap=True)


def print_text(text: str) -> None:
    """A paragraph, broken between words on a terminal and nowhere else."""
    console = Console(highlight=False)
    console.print(Text(text), soft_wrap=not console.is_terminal)


def print_part(text: str) -> None:
    """A part of a model's reply, at once: its lines are kept, and other control characters are not."""
    print("\n".join(plain(line, len(line)) for line in text.split("\n")), end="", flush=True)


def print_wait(line: str) -> None:
    """What a person at a terminal waits for; beside the results, and not where errors go into a file."""
    if sys.stderr.isatty():
        print(plain(line, 300), file=sys.stderr, flush=True)


@contextmanager
def questions_progress(name: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar for a person at a terminal, beside the results: how many questions a model has answered, and the time left.

    Yields what is to be called with the number of questions done and their total, as `evaluate` does.
    """
    steady = sys.stderr.isatty() and verbosity() != "quiet"
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not steady) as progress:
        task = progress.add_task(f"asking {plain(name, 60)}", total=total)
        yield lambda done, _: progress.update(task, completed=done)


def _text_table(title: str, rows: Sequence[Sequence[str]], gap: int) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0))
    for head in rows[0]:
        table.add_column(Text(head), overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def _two_lines(cell: str) -> str:
    """`+1.0 [+0.5, +1.5]` and `1.0 ±0.5` with what they are sure of below them."""
    value, bracket, ends = cell.partition(" [")
    return f"{value}\n[{ends.replace(' ', '').replace('+', '')}" if bracket else cell.replace(" ±", "\n±")


def _cell(values: Mapping[str, float]) -> str:
    mean, low, high = (100 * values[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _asked(scores: Mapping[str, Any]) -> str:
    return f"{scores['questions']} held-out questions about {scores['images']} images"


def results_table(summary: Mapping[str, Any], names: Sequence[str] = ("before", "after")) -> None:
    """Print the accuracy of two models on the same questions, with 95 % intervals and the paired difference.

    Args:
        summary: `before`, `after` and `difference`, as in a run's `summary.json`.
        names: what `before` and `after` are called.
    """
    before, after, difference = summary["before"], summary["after"], summary["difference"]
    heads = ["\n".join(textwrap.wrap(plain(name), 20)) for name in names]  # no wider than the numbers below
    rows = [["", *heads, "difference", "p"], *_rows([before, after], difference)]
    print_table(f"Accuracy in % on {_asked(before)}, 95 % intervals", rows)


def evaluation_table(names: Sequence[str], scores: Sequence[Scores]) -> dict[str, Any]:
    """Print the accuracies of one model, or of a base and what became of it; returns them, ready for JSON."""
    from ireasoner.training.evaluation import compare

    if len(scores) == 2:
        summary = {"before": scores[0].summary(), "after": scores[1].summary(), "difference": compare(*scores)}
        results_table(summary, names)
        return {"models": list(names), **summary}
    summary = scores[0].summary()
    rows = [["", "accuracy"], *_rows([summary])]
    print_table(f"{plain(names[0])}: accuracy in % on {_asked(summary)}, 95 % intervals", rows)
    return {"models": list(names), "scores": summary}


def selection_table(scores: Mapping[str, Scores], chosen: str) -> None:
    """Print by which scores a checkpoint was chosen, and which one it is."""
    rows = [["", *MEASURES, ""]]
    for name, found in scores.items():
        means = [f"{100 * found.measures[measure].mean():.1f}" for measure in MEASURES]
        rows.append([plain(name), *means, "chosen" if name == chosen else ""])
    first = next(iter(scores.values())).summary()
    print_table(f"Chosen by: accuracy in % on {first['questions']} questions about {first['images']} images", rows)


def comparison_table(found: Comparison) -> None:
    """Print what `ireasoner compare` found, by which tests, and its notes."""
    rows = [["task", "metric", "documents", "A", "B", "B − A", "p", "won, lost, tied"]]
    for row in found.rows:
        mean, low, high = (f"{row.difference[name]:+.3g}" for name in ("mean", "low", "high"))
        cells = [f"{row.a:.4g}", f"{row.b:.4g}", f"{mean} [{low}, {high}]", _p(row.difference["p"])]
        counts = f"{row.wins}, {row.losses}, {row.ties}"
        rows.append([plain(row.task), plain(row.metric), str(row.documents), *cells, counts])
    print_table("Two models on the same documents, with 95 % intervals", rows)
    for test in dict.fromkeys(row.test for row in found.rows):
        tested = [plain(f"{row.metric} of {row.task}") for row in found.rows if row.test == test]
        name = "McNemar's exact test" if test == "McNemar" else "random sign flips"
        print_text(f"p by {name}: {', '.join(tested)}")
    for note in found.notes:
        print_text(plain(note, 1000))


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 else "< 0.0001"


def _rows(
    parts: Sequence[Mapping[str, Any]], difference: Mapping[str, Mapping[str, float]] | None = None
) -> list[list[str]]:
    """A row for each value that all of the summaries have.

    Below a measure stand what is right strictly and, where that is known, the share of its texts that could be read,
    and what share of these is right.
    """
    labels = {}
    for measure in MEASURES:
        labels |= {measure: measure, f"strict_{measure}": " strictly"}
        if measure in READABLE:
            labels |= {READABLE[measure]: " readable", f"{measure}_of_readable": " of these"}
    rows = []
    for name, label in {**labels, **OTHER_ROWS}.items():
        values = [part.get(name) for part in parts]
        if None in values:
            continue
        cells = [_cell(value) if isinstance(value, Mapping) else f"{value:.3f}" for value in values]
        change = difference.get(name) if difference else None
        if change:
            cells += [_cell(change), f"{change['p']:.4f}"]
        rows.append([label, *cells, *[""] * (3 * len(parts) - 2 - len(cells))])  # one column, or four of two models
    return rows
