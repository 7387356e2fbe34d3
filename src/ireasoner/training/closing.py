"""The end of a run: return to a healthy checkpoint if it ended itself, publish the adapters, evaluate, sum up."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from safetensors import SafetensorError

from ireasoner import __version__
from ireasoner.method.types import ROLES, Role
from ireasoner.training.card import find_base, model_card
from ireasoner.training.checkpoints import apply_umask
from ireasoner.training.energy import energy_of
from ireasoner.training.evaluation import EvaluationOptions, Scores, compare, evaluate
from ireasoner.training.fitting import tell_shortages
from ireasoner.training.recorder import LARGEST, RunDirectoryError, read_json, read_records, write_json
from ireasoner.training.state import Run, go_back, tidy_checkpoints

BEFORE = "before.json"
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last step, whether it is complete, and the contents of its `summary.json` if it is."""

    step: int
    complete: bool
    summary: dict[str, Any] | None


def finish(run: Run, before: Scores | None) -> dict[str, Any]:
    """Write `solver/`, `proposer/` and `summary.json`, and return the summary.

    An adapter whose matrices B are 0 is not published, for it changes nothing. The adapters come first: whatever
    happens to the evaluation, they are there.

    Args:
        run: the run, after its last step.
        before: scores of the backbone on the held-out questions; None if there are none.
    """
    best_step = go_back(run) if run.alarm else run.step
    published: list[Role] = [role for role in ROLES if run.policy.largest_lora_b(role) > 0]
    if run.processes.is_main:
        _publish_adapters(run, published)
        tidy_checkpoints(run)
    after = evaluate_role(run, "after", "solver") if before is not None and "solver" in published else None
    difference = compare(before, after) if before and after else None
    summary: dict[str, Any] = {
        "steps": run.step,
        "stopped_early": run.alarm is not None,
        "reason": run.alarm.reason if run.alarm else None,
        "best_step": best_step,
        "trained_roles": [role for role in published if run.moved(role)],
        "images": len(run.pool),
        "skipped_images": len(run.pool.skipped),
        "before": before.summary() if before else None,
        "after": after.summary() if after else None,
        "difference": difference,
        "training_seconds": run.elapsed,
        "energy": _energy(run, 100 * difference["greedy"]["mean"] if difference else None),
        "versions": versions(run),
    }
    run.recorder.sync()
    base = find_base(run.config.model, run.policy.commit)
    for role in published:
        run.recorder.write_text(f"{role}/README.md", model_card(run.config, summary, base, role))
    run.recorder.write_text("summary.json", write_json(summary))
    run.trackers.summarise(run.step, summary, lambda: run.observer.verdict(run.out))
    return summary


def _energy(run: Run, points: float | None) -> dict[str, Any] | None:
    """The energy of all steps that are recorded, from points of accuracy that were gained."""
    trajectories = run.config.schedule.images_per_step * run.config.sampling.group_size
    return energy_of(read_records(run.out / "metrics.jsonl"), trajectories, points)


def scores_before(run: Run) -> Scores | None:
    """Scores of the backbone on the held-out questions, measured once and kept in `before.json`; None without any.

    A file that is damaged, or of other questions, is made again.
    """
    if not run.questions:
        return None
    match = run.config.match
    told = json.dumps([[str(q.image), q.question, q.answer, q.others, q.match or match] for q in run.questions])
    digest = hashlib.sha256(told.encode()).hexdigest()
    kept = read_json(run.out / BEFORE, LARGEST)
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        if kept["questions_sha256"] == digest:
            return Scores.of_questions(kept["per_question"])
    before = evaluate_role(run, "before", None)
    kept = {"questions_sha256": digest, "per_question": before.per_question()}
    run.recorder.write_text(BEFORE, write_json(kept))
    return before


def evaluate_role(run: Run, which: str, role: Role | None) -> Scores:
    """Scores of a role (None: the backbone) on the held-out questions. The observer sees `which` as its name."""
    scores = evaluate(
        run.policy,
        run.questions,
        role,
        run.config.sampling,
        EvaluationOptions(
            match=run.config.match,
            seed=run.config.seed,
            max_image_pixels=run.config.max_image_pixels,
            images_per_item=run.config.images_per_item,
            frame_rate=run.config.frame_rate,
        ),
        truth=run.truth,
        on_progress=lambda done, total: run.observer.on_evaluation(which, done, total),
        stop_asked=run.stop_asked,
        processes=run.processes,
        engine=run.engine,
    )
    tell_shortages(run)
    return scores


def versions(run: Run) -> dict[str, str]:
    """Versions of this package, of the packages that the numbers of a run depend on, and of a model from the hub."""
    model = {"model": f"{run.config.model}@{run.policy.commit}"} if run.policy.commit else {}
    return {"ireasoner": __version__, **{name: metadata.version(name) for name in PACKAGES}, **model}


def _publish_adapters(run: Run, published: Sequence[Role]) -> None:
    """Write the adapters of these roles. They are renamed when complete: a kill leaves no half-written one."""
    staging = run.out / ".adapters"
    try:
        if staging.is_symlink() or staging.is_file():
            staging.unlink()
        shutil.rmtree(staging, ignore_errors=True)
        run.policy.save_adapters(staging)
        apply_umask(staging)
        for role in ROLES:
            shutil.rmtree(run.out / role, ignore_errors=True)
            if role in published:
                (staging / role).rename(run.out / role)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"the adapters could not be written to {run.out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
