"""Questions that the solver answers greedily and that teach it nothing.

The probes are the same questions again and again, to show how answers change in training. Questions about blanked
images show whether majority answers need the image at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ireasoner.method.answers import answer_key
from ireasoner.method.texts import parse_question, parse_trajectory, proposer_messages, solver_messages
from ireasoner.method.types import Completion, Episode, ProbeAnswer, Solution
from ireasoner.model.inputs import EncodedImage, encode_images
from ireasoner.rollouts.engine import Request
from ireasoner.training.evaluation import blanked
from ireasoner.training.items import Item
from ireasoner.training.recorder import read_records
from ireasoner.training.state import Run

BLANK_QUESTIONS = 8  # most questions of a step that are asked again about a blank image


def probe(run: Run) -> None:
    """Answer the probe questions and record the answers. The questions are made at step 0 by the untrained backbone."""
    schedule, sampling = run.config.schedule, run.config.sampling
    if schedule.probe_every == 0 or schedule.probe_images == 0:
        return
    items = run.pool.peek(schedule.probe_images)
    encoded = encode_images(run.policy, [item.image for item in items])
    if run.step == 0:
        requests = [
            Request(
                image,
                proposer_messages(sampling.proposer_prompt, sampling.domain, shown=image.shown),
                (run.config.seed, 0, i),
            )
            for i, image in enumerate(encoded)
        ]
        proposals = run.engine.sample(requests, None, max_tokens=sampling.max_question_tokens)
        questions = [
            parse_question(c.text, c.finish_reason, request.prompt)
            for (c,), request in zip(proposals, requests, strict=True)
        ]
        asked = {item.name: q.text for item, q in zip(items, questions, strict=True) if q.well_formed}
    else:
        records = read_records(run.out / "probes.jsonl")
        asked = {record["image"]: record["question"] for record in records if record["step"] == 0}
    probes = [(item, image) for item, image in zip(items, encoded, strict=True) if item.name in asked]
    answers = solve_greedily(run, [image for _, image in probes], [asked[item.name] for item, _ in probes])
    for (item, _), (completion, solution) in zip(probes, answers, strict=True):
        run.recorder.probe(
            ProbeAnswer(
                step=run.step,
                image=item.name,
                thumbnail=run.thumbnail(item),
                question=asked[item.name],
                text=completion.text,
                answer=solution.answer,
                reasoning_steps=solution.reasoning_steps,
            )
        )


def blank_survival(run: Run, episodes: Sequence[Episode], items: Sequence[Item]) -> dict[str, float]:
    """Share of majority answers that the solver also gives to a gray image of the same size, as `blank_survival`.

    Empty if the check is not due, or if no group has a majority answer.
    """
    rows = [i for i, e in enumerate(episodes) if e.majority_answer is not None][:BLANK_QUESTIONS]
    if not rows or not run.due(run.config.watch.blank_every):
        return {}
    own = [rows[n] for n in run.processes.share(len(rows))]
    encoded = encode_images(run.policy, blanked([items[i].image for i in own]))
    questions = [episodes[i].question.text for i in own]
    survived = [
        solution.answer is not None and answer_key(solution.answer, question) == episodes[i].majority_answer
        for i, question, (_, solution) in zip(own, questions, solve_greedily(run, encoded, questions), strict=True)
    ]
    return {"blank_survival": fmean(run.processes.gather(survived, len(rows)))}


def solve_greedily(
    run: Run, images: Sequence[EncodedImage], questions: Sequence[str]
) -> list[tuple[Completion, Solution]]:
    """The solver's most likely completion for a question about each image, and what was read in it."""
    sampling = run.config.sampling
    requests = [
        Request(image, solver_messages(sampling.solver_prompt, question, image.shown))
        for image, question in zip(images, questions, strict=True)
    ]
    groups = run.engine.sample(requests, "solver", max_tokens=sampling.max_solution_tokens, temperature=0)
    return [
        (c, parse_trajectory(c.text, c.finish_reason, sampling.solution_form, request.prompt))
        for (c,), request in zip(groups, requests, strict=True)
    ]
