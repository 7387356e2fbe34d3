"""The command line. Thin: it reads options, calls a room and shows what it says; heavy rooms are imported on use."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ireasoner import __version__
from ireasoner.method.types import UsageError

PROGRAM = "ireasoner"
SIDES = ("ours", "plain")
STYLES = ("chalk", "varied", "plain")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of `train` alone would fill a screen."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _whole(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return whole_number


def _temperature(text: str) -> float:
    if not 0 <= (value := float(text)) < 100:
        raise argparse.ArgumentTypeError(f"{text} is not a temperature: 0 (greedy) or more")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: 0 to 65535")
    return int(text)


def _writable(text: str) -> Path:
    """A file to write later; better to find out now than after hours of work."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return path


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; training options come from `ireasoner.training.config`."""
    parser = _Parser(
        prog=PROGRAM,
        description="Self-evolving visual reasoning from a folder of unlabeled images: a Proposer asks, a Solver "
        "answers several times, and their agreement is the reward.",
        epilog=f"Start with: {PROGRAM} demo",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="self-evolve a model on a folder of images",
        description="Self-evolve a model on a folder of unlabeled images, or continue a run.",
    )
    train.add_argument("--out", type=Path, metavar="RUN", help="the run directory to write")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue this run")
    _add_config_options(train, _config_groups())
    train.set_defaults(function=_train)

    demo = commands.add_parser(
        "demo",
        help="watch the tiny model improve itself, in minutes, on a CPU",
        description="Write a folder of unlabeled pictures, self-evolve the tiny model that ships here on it, and show "
        "its accuracy on held-out questions before and after.",
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="run directory (%(default)s)")
    demo.add_argument("--recipe", default="default", help="recipe (%(default)s)")
    demo.add_argument("--style", default="chalk", choices=STYLES, help="how the pictures are drawn (%(default)s)")
    demo.add_argument("--seed", type=_whole(0), default=0, help="seed of training (%(default)s)")
    demo.add_argument("--steps", type=_whole(1), help="training steps (default: the tiny preset's)")
    demo.set_defaults(function=_demo)

    evaluate = commands.add_parser(
        "eval",
        help="held-out accuracy of a run or a model; two are compared on the same questions",
        description="Greedy, mean@1, maj@5 and pass@5 accuracy with 95 %% intervals on labelled questions.",
    )
    evaluate.add_argument("models", nargs="+", metavar="TARGET", help="run, checkpoint or model; two: a paired test")
    evaluate.add_argument(
        "--data", type=Path, required=True, metavar="FILE.jsonl", help="lines of image, question, answer"
    )
    evaluate.add_argument("--limit", type=_whole(1), help="use the first so many questions")
    evaluate.add_argument("--preset", help="preset for plain models: prompts and lengths (default: 7b; tiny for tiny)")
    evaluate.add_argument("--temperature", type=_temperature, default=1.0, help="of the sampled answers (%(default)s)")
    evaluate.add_argument("--seed", type=_whole(0), default=0, help="seed of the sampled answers (%(default)s)")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    evaluate.add_argument(
        "--blank", action="store_true", help="gray images instead of the true ones: how much is answered unseen"
    )
    evaluate.add_argument("--json", type=_writable, metavar="FILE", help="write the results here too")
    evaluate.set_defaults(function=_eval)

    ablate = commands.add_parser(
        "ablate",
        help="recipes x seeds beside the base and the controls: one table with intervals",
        description="Train every recipe under every seed, score all of them and the base on the same held-out "
        "questions, and write OUT/ablation.md, .csv, .png and .json. Stopped, it goes on with: ireasoner ablate OUT. "
        "More recipes or seeds may be named later; what OUT holds is not made again.",
        argument_default=argparse.SUPPRESS,
    )
    ablate.add_argument("out", type=Path, metavar="OUT", help="folder to write, or to go on in")
    ablate.add_argument(
        "--recipes",
        nargs="+",
        metavar="RECIPE",
        help="names or YAML files (paper outcome-only answers-only random-reward default)",
    )
    ablate.add_argument("--seeds", type=_whole(1), metavar="N", help="runs of each recipe, seeds 0 to N - 1 (5)")
    ablate.add_argument(
        "--quick",
        action="store_true",
        help="2 seeds, 256 questions, 24 steps, 2 jobs: 8 minutes on two CPU cores",
    )
    ablate.add_argument(
        "--cooled", action="store_true", help="one more control: the base sampled as confidently as the first recipe"
    )
    ablate.add_argument("--jobs", type=_whole(1), metavar="N", help="arms that run at a time, sharing the cores (1)")
    ablate.add_argument("--questions", type=_whole(1), metavar="N", help="held-out questions, at most (512)")
    ablate.add_argument("--style", choices=STYLES, help="how the embedded world is drawn (chalk)")
    ablate.add_argument("--split", choices=["validation", "test"], help="of the embedded world's questions (test)")
    ablate.add_argument("--model", help="a folder, a hub id, or 'tiny' (tiny)")
    ablate.add_argument("--images", metavar="FOLDER", help="your own unlabeled images; needs --data")
    ablate.add_argument("--data", metavar="FILE.jsonl", help="your own held-out questions: image, question, answer")
    ablate.add_argument("--labels", metavar="FILE.jsonl", help="labelled questions on your images, for oracle")
    _add_config_options(ablate, {"scale (a preset sets these; the same for every arm)": _scale_options()})
    ablate.set_defaults(function=_ablate)

    view = commands.add_parser(
        "view",
        help="look at a run in the browser, while it goes or afterwards",
        description="Show a run on a local page: is it working, what does it ask and answer, how do the steps agree, "
        "how did it change, what ran. Follows a run that goes on. Ctrl-C ends it.",
    )
    _add_run_options(view)
    view.add_argument("--port", type=_port, default=0, metavar="N", help="port on 127.0.0.1 (any that is free)")
    view.add_argument("--no-browser", action="store_true", help="only print the address")
    view.set_defaults(function=_view)

    report = commands.add_parser(
        "report",
        help="write that page as one file that can be mailed",
        description="Write the page about a run, with its pictures, as one HTML file that needs nothing else.",
    )
    _add_run_options(report)
    report.add_argument("--out", type=_writable, metavar="FILE", help="the file (RUN/report.html)")
    report.set_defaults(function=_report)

    runs = commands.add_parser(
        "runs",
        help="list runs with their state and results",
        description="List the runs in a folder and below it, the latest last.",
    )
    runs.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="(%(default)s)")
    runs.set_defaults(function=_runs)

    validity = commands.add_parser(
        "validity",
        help="is step agreement worth being a reward? from a run's episodes, without training",
        description="Of a run's trajectories with the same answer, does the one with the truer steps have the higher "
        "step agreement; what does it say beyond answer agreement; and what do edits of a step do to it?",
    )
    validity.add_argument("run", type=Path, metavar="RUN", help="a run directory, finished or not; it is only read")
    validity.add_argument(
        "--truth",
        type=Path,
        metavar="FILE",
        help="lines of image and picture, as playground writes (default: FOLDER.truth.jsonl beside the run's images)",
    )
    validity.add_argument(
        "--steps", type=_whole(1), nargs=2, metavar=("FIRST", "LAST"), help="training steps to read (default: all)"
    )
    validity.add_argument("--json", type=_writable, metavar="FILE", help="write the results here too")
    validity.set_defaults(function=_validity)

    doctor = commands.add_parser(
        "doctor",
        help="is what training takes for granted true of this model, on this machine?",
        description="Check a model, in about a minute: that the update sees the image, that the reference is the "
        "frozen model, that each role trains and only it, that sampler and learner agree, that only the language "
        "model is trainable. Each check with its figure; exit code 1 if one fails. Nothing is written.",
    )
    doctor.add_argument("model", metavar="MODEL", help="a folder, a hub id, or 'tiny'")
    doctor.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    doctor.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the backbone (bfloat16 on a GPU, float32 on a CPU)"
    )
    doctor.set_defaults(function=_doctor)

    bench = commands.add_parser(
        "bench",
        help="time one training step by phases, with and without shared prompts",
        description="Time one training step as train does it (ours) and the same work without shared prompts (plain), "
        "on one model, with completions of a forced length and in turns; beside it, what this machine's arithmetic and "
        "memory allow.",
    )
    bench.add_argument(
        "--model",
        default="tiny",
        help="a folder, a hub id, 'tiny', or a size with random weights: 'random-25m', 'random-7b' (%(default)s)",
    )
    bench.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="what to time (all)")
    bench.add_argument("--group-size", type=_whole(2), metavar="N", help="trajectories of a question (the preset's)")
    bench.add_argument(
        "--image-tokens", type=_whole(1), metavar="N", help="of each picture, about (9 for tiny, else 144)"
    )
    bench.add_argument(
        "--images-per-step", type=_whole(1), nargs="+", default=[1, 16], metavar="N", help="(%(default)s)"
    )
    bench.add_argument("--tokens", type=_whole(2), default=40, help="tokens of each solver completion (%(default)s)")
    bench.add_argument("--repetitions", type=_whole(1), default=5, help="of each measurement (%(default)s)")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    bench.add_argument("--json", type=_writable, metavar="FILE", help="write the results here too")
    bench.set_defaults(function=_bench)

    world = commands.add_parser(
        "playground",
        help="write the embedded world's pictures and questions as files",
        description="Write unlabeled pictures (OUT/unlabeled) and held-out questions (OUT/SPLIT) of the world.",
    )
    world.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    world.add_argument("--style", default="chalk", choices=STYLES, help="how the pictures are drawn (%(default)s)")
    world.add_argument("--images", type=_whole(1), default=512, help="unlabeled pictures (%(default)s)")
    world.add_argument("--questions", type=_whole(1), default=512, help="labelled questions (%(default)s)")
    world.add_argument("--split", default="test", choices=["validation", "test"], help="(%(default)s)")
    world.add_argument(
        "--items", type=int, nargs=2, default=[2, 4], metavar=("LEAST", "MOST"), help="items in a picture"
    )
    world.add_argument("--seed", type=_whole(0), default=0, help="(%(default)s)")
    world.set_defaults(function=_playground)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, finished or not")
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="FILE",
        help="what is true of the images, as playground writes it, to mark wrong majorities (what lies in RUN)",
    )


def _config_groups() -> dict[str, list[str]]:
    from ireasoner.training.config import PATHS, PRESET_OPTIONS, RECIPE_OPTIONS

    return {
        "run": [name for name in PATHS if name not in (*RECIPE_OPTIONS, *PRESET_OPTIONS)],
        "scale (a preset sets these)": PRESET_OPTIONS,
        "rewards, advantages, KL (a recipe sets these)": RECIPE_OPTIONS,
    }


def _scale_options() -> list[str]:
    """Training options that an ablation takes: what its arms share."""
    from ireasoner.training.config import PRESET_OPTIONS

    return ["preset", "device", *(name for name in PRESET_OPTIONS if name != "eval_questions")]


def _add_config_options(parser: argparse.ArgumentParser, groups: dict[str, list[str]]) -> None:
    from ireasoner.training.config import option

    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            field = option(name)
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                default=argparse.SUPPRESS,
                nargs="+" if isinstance(field.default, tuple) else None,
                metavar="VALUE",
                help=(field.description or "").replace("%", "%%"),
            )


def _train(arguments: argparse.Namespace) -> int:
    from ireasoner.training import config as configs

    flags = _absolute({name: value for name, value in vars(arguments).items() if name in configs.PATHS})
    if arguments.resume is not None:
        if arguments.out is not None:
            raise UsageError("--resume RUN continues RUN in place: leave out --out")
        config = configs.load_config(arguments.resume / "config.yaml")
        if differing := configs.conflicts(config, flags):
            raise UsageError(f"cannot resume with other options: {'; '.join(differing)}")
        return _follow(config, arguments.resume, resuming=True, trusts_reward="reward" in flags)
    missing = [
        name for name in ("images", "model", "out") if name not in flags and getattr(arguments, name, None) is None
    ]
    if missing:
        raise UsageError(f"train needs {', '.join('--' + name for name in missing)} (or --resume RUN)")
    return _follow(configs.resolve(flags), arguments.out, resuming=False)


def _absolute(flags: dict[str, Any]) -> dict[str, Any]:
    """Paths from the root, for a run may be resumed from another folder."""
    paths = {name for name in ("images", "labels", "eval_data", "data") if name in flags}
    paths |= {name for name in ("model",) if name in flags and Path(flags[name]).is_dir()}
    return {name: str(Path(value).absolute()) if name in paths else value for name, value in flags.items()}


def _follow(config: Any, out: Path, *, resuming: bool, trusts_reward: bool = False) -> int:
    """Run or resume with a display; the exit code."""
    from ireasoner.app.display import Display, quiet_libraries, results_table
    from ireasoner.page import write_report

    quiet_libraries()
    from ireasoner.playground.truth import step_truth
    from ireasoner.training import loop

    def go(observer: Any = None) -> Any:
        if resuming:
            return loop.resume(config, out, observer, step_truth, trusts_reward=trusts_reward)
        return loop.start(config, out, observer, step_truth)

    if os.environ.get("RANK", "0") != "0":  # another of the run's processes shows and writes
        outcome = go()
        return 0 if outcome.complete else 130
    with Display(config, out) as display:
        outcome = go(display.observer())
        if outcome.complete:
            try:
                write_report(out)
            except OSError as error:  # the run itself is safe by now
                raise UsageError(f"the run is complete, but its report could not be written: {error}") from None
    if not outcome.complete:
        print(f"Stopped after step {outcome.step}, saved. Continue with: {PROGRAM} train --resume {out}")
        return 130
    if outcome.summary and outcome.summary["before"]:
        results_table(outcome.summary)
    print(f"Run directory: {out}   adapters: {out}/solver, {out}/proposer")
    print(f"Look at it: {PROGRAM} view {out}   or open {out}/report.html")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from ireasoner.playground import dataset
    from ireasoner.training import config as configs

    out: Path = arguments.out
    data = out / "data"
    flags = {
        "images": str((data / "unlabeled").absolute()),
        "eval_data": str((data / "test" / "test.jsonl").absolute()),
        "eval_questions": 512,
        "model": "tiny",
        "recipe": arguments.recipe,
        "seed": arguments.seed,
        **({"steps": arguments.steps} if arguments.steps else {}),
    }
    config = configs.resolve(flags)
    if (out / "config.yaml").exists():
        if differing := configs.conflicts(configs.load_config(out / "config.yaml"), flags):
            raise UsageError(f"{out} holds a run with other options ({'; '.join(differing)}): choose another --out")
        finished = (out / "summary.json").exists()
        print(f"{out} holds this run{', finished: choose another --out for a new one' if finished else ': going on'}.")
        return _follow(config, out, resuming=True)
    print(f"Drawing 512 unlabeled pictures into {data}/unlabeled and 512 held-out questions into {data}/test.")
    try:
        dataset.write_unlabeled(data / "unlabeled", 512, arguments.style)
        dataset.write_questions(data / "test", 512, arguments.style)
    except OSError as error:
        raise UsageError(f"cannot write to {data}: {error.strerror}") from None
    return _follow(config, out, resuming=False)


def _eval(arguments: argparse.Namespace) -> int:
    if len(arguments.models) > 2:
        raise UsageError("eval takes one run or model, or two to compare")
    from ireasoner.app.display import evaluation_table, print_text, prior_line, quiet_libraries

    quiet_libraries()
    from ireasoner.playground.truth import step_truth
    from ireasoner.training.evaluation import answer_prior, evaluate_target, load_questions
    from ireasoner.training.recorder import write_json

    questions = load_questions(arguments.data, arguments.limit, step_truth)
    names = [f"{target}, images blanked" if arguments.blank else target for target in arguments.models]
    scores = [
        evaluate_target(
            target,
            questions,
            preset=arguments.preset,
            temperature=arguments.temperature,
            seed=arguments.seed,
            device=arguments.device,
            blank=arguments.blank,
            truth=step_truth,
        )
        for target in arguments.models
    ]
    result = evaluation_table(names, scores)
    if arguments.blank:
        result["answer_prior"] = answer_prior(questions)
        print_text(prior_line(result["answer_prior"]))
    if arguments.json:
        arguments.json.write_text(write_json(result), "utf-8")
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    from ireasoner.app.display import print_table, print_text, prior_line, quiet_libraries
    from ireasoner.training import config as configs

    quiet_libraries()
    from ireasoner.studies.ablate import QUICK, QUICK_JOBS, Ablation, Settings, settle
    from ireasoner.studies.ablation_tables import legend, tables

    out = arguments.out.absolute()
    flags = _absolute(vars(arguments))
    given = {name: value for name, value in flags.items() if name in Settings.model_fields}
    given["training"] = {name: value for name, value in flags.items() if name in _scale_options()}
    if "recipes" in given:
        known = configs.names("recipes")
        given["recipes"] = [
            r if r in known or not Path(r).is_file() else str(Path(r).absolute()) for r in flags["recipes"]
        ]
    jobs = flags.get("jobs", 1)
    if "quick" in flags:
        jobs = flags.get("jobs", QUICK_JOBS)
        given = {**QUICK, **given, "training": {**QUICK["training"], **given["training"]}}
    result = Ablation(out, settle(out, given)).run(jobs)
    if result is None:
        print(
            f"Stopped and saved. Continue with: {PROGRAM} ablate {arguments.out}"
            + (f" --jobs {jobs}" if jobs > 1 else "")
        )
        return 130
    for title, rows in tables(result):
        print_table(title, rows)
    print_text(prior_line(result["answer_prior"]))
    print_text(legend(result))
    print(f"Written: {arguments.out}/ablation.md, ablation.csv, ablation.png, ablation.json")
    return 0


def _view(arguments: argparse.Namespace) -> int:
    from ireasoner.page.server import serve

    def ready(address: str) -> None:
        print(f"{arguments.run}: {address}   (Ctrl-C ends it)", flush=True)
        # Where there is no desktop, a browser would be one of text, in this very terminal.
        if not arguments.no_browser and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
            webbrowser.open(address)

    with suppress(KeyboardInterrupt):  # how a viewer ends
        serve(arguments.run, arguments.truth, arguments.port, ready)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ireasoner.page import write_report

    try:
        path = write_report(arguments.run, arguments.out, arguments.truth)
    except OSError as error:
        raise UsageError(f"the report could not be written: {error}") from None
    print(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    from ireasoner.app.display import plain, print_table
    from ireasoner.page.overview import overview

    rows = overview(arguments.folder)
    if len(rows) == 1:
        print(f"No run in {arguments.folder}. Start one with: {PROGRAM} demo")
        return 0
    print_table(f"Runs in {plain(str(arguments.folder))}", [[plain(cell) for cell in row] for row in rows])
    return 0


def _validity(arguments: argparse.Namespace) -> int:
    if arguments.steps and arguments.steps[0] > arguments.steps[1]:
        raise UsageError("--steps takes FIRST and LAST, FIRST not after LAST")
    from ireasoner.app.display import plain, print_table, print_text, quiet_libraries

    quiet_libraries()
    from ireasoner.studies.validity import sentences, tables, validity
    from ireasoner.training.recorder import write_json

    report = validity(arguments.run, arguments.truth, arguments.steps and tuple(arguments.steps))
    for sentence in sentences(report):
        print_text(plain(sentence, 300))
    for title, rows in tables(report):
        print_table(title, rows)
    if arguments.json:
        arguments.json.write_text(write_json(report), "utf-8")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from ireasoner.app.display import print_finding, quiet_libraries

    quiet_libraries()
    from ireasoner.model.backbone import resolve_device
    from ireasoner.studies.doctor import examine

    device = resolve_device(arguments.device)
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    print(f"{arguments.model} in {dtype} on {device}")
    failed = 0
    for finding in examine(arguments.model, dtype=dtype, device=device):
        print_finding(finding)
        failed += not finding.passed
    print(f"{failed} of the checks failed: do not train on this." if failed else "All is as training takes it to be.")
    return 1 if failed else 0


def _bench(arguments: argparse.Namespace) -> int:
    from ireasoner.app.display import print_table, print_text, quiet_libraries

    quiet_libraries()
    from ireasoner.studies.bench import heading, load_bench, measure, table
    from ireasoner.training.recorder import write_json

    size = arguments.tokens, arguments.group_size, arguments.image_tokens
    bench = load_bench(arguments.model, *size, arguments.device)
    known = {"ours": bench.ours, "plain": bench.plain}
    sides = {name: known[name] for name in SIDES if name in arguments.sides}
    result = measure(bench, sides, arguments.images_per_step, arguments.repetitions)
    print_text(heading(result))
    for row in result["sizes"]:
        print_table(*table(row))
    if arguments.json:
        arguments.json.write_text(write_json(result), "utf-8")
    return 0


def _playground(arguments: argparse.Namespace) -> int:
    from ireasoner.playground import dataset

    items = (arguments.items[0], arguments.items[1])
    if not 2 <= items[0] <= items[1] <= 6:
        raise UsageError("--items takes LEAST and MOST between 2 and 6")
    out, style, seed = arguments.out, arguments.style, arguments.seed
    try:
        dataset.write_unlabeled(out / "unlabeled", arguments.images, style, seed, items)
        path = dataset.write_questions(out / arguments.split, arguments.questions, style, arguments.split, seed, items)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from None
    print(f"Unlabeled pictures: {arguments.out / 'unlabeled'}   labelled questions: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2: a mistake that the user can put right, in one sentence)."""
    try:
        arguments = build_parser().parse_args(argv)
        return arguments.function(arguments)
    except UsageError as error:
        rank = os.environ.get("RANK", "0")  # of several processes of one run
        print(f"{PROGRAM}: {error}" if rank == "0" else f"{PROGRAM}, process {rank}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; nothing saved so far is lost", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
