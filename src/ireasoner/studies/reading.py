"""Can this model learn here? What it asks and answers about a few of the user's images, before anything is trained.

The images are the first that a run with the same config draws, and the run's own self-play plays them, in steps of as
many images as the run takes. So what is read here is what training would see. Nothing is updated or written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, pstdev
from typing import Literal

from ireasoner.method.texts import opens_thought, parse_trajectory
from ireasoner.method.types import Episode, Form, Sampled, Trajectory
from ireasoner.studies.doctor import Finding
from ireasoner.training.advice import advice
from ireasoner.training.checks import Inputs
from ireasoner.training.config import Config, as_flag
from ireasoner.training.floors import FLOORS
from ireasoner.training.items import SET_ASIDE, Item
from ireasoner.training.opening import open_selfplay
from ireasoner.training.teaching import gate
from ireasoner.training.watch import repeated_share

IMAGES = 4  # at most
FORMS: tuple[Form, ...] = ("tags", "boxed", "answer-line")
BOUNDS = {floor.signal: floor for floor in FLOORS}  # what ends a run or warns in it is a failed check here

# Why a text could not be read: its form, although the model ended it or never began as it was asked to; that it was cut
# off before its answer; or that it went on behind its answer, or in a loop.
Cause = Literal["form", "length", "end"]


@dataclass(frozen=True)
class Drawn:
    """The first images that a run with these inputs would draw."""

    inputs: Inputs
    items: list[Item]

    @property
    def skipped(self) -> dict[str, str]:
        """Why images were passed over, by their names; without those of the evaluation data, which the pool counts."""
        return {name: reason for name, reason in self.inputs.pool.skipped.items() if reason != SET_ASIDE}


def draw(inputs: Inputs) -> Drawn:
    """The first images of a run, at most `IMAGES`. Nothing is loaded yet.

    Raises:
        ImageError: none can be decoded.
    """
    pool = inputs.pool.labelled(inputs.labels) if inputs.config.labelled_alone else inputs.pool
    return Drawn(inputs, pool.peek(IMAGES))


def read(drawn: Drawn) -> list[Episode]:
    """Load the model and play these images with the self-play of a run, without any update.

    Raises:
        UsageError: the model, or something else that the config names, cannot be used.
    """
    inputs = drawn.inputs
    config = inputs.config
    selfplay = open_selfplay(config, inputs.model, reward=inputs.reward)
    size = config.schedule.images_per_step
    steps = [drawn.items[start : start + size] for start in range(0, len(drawn.items), size)]
    return [episode for step, items in enumerate(steps, 1) for episode in selfplay.play(step, items).episodes]


def judge(config: Config, episodes: Sequence[Episode]) -> list[Finding]:
    """Whether these texts are of a kind that training can learn from: one finding for each thing that it takes.

    Without a readable question there are no solutions, and nothing is said about them.
    """
    groups = [episode for episode in episodes if episode.trajectories]
    trajectories = [trajectory for episode in groups for trajectory in episode.trajectories]
    found = [_questions(config, episodes)]
    if trajectories:
        found.append(_solutions(config, groups))
    proposals = [episode.proposal for episode in episodes if episode.proposal]  # none where questions come from labels
    if proposals or trajectories:
        found.append(_ends(config, proposals, trajectories))
    voting = [group for group in groups if len(_keys(group)) >= 2]
    if voting and config.recipe.reward in ("agreement", "discrete"):
        found.append(_votes(config, voting))
    if trajectories:
        found.append(_rewards(config, groups))
    return found


def verdict(config: Config, findings: Sequence[Finding]) -> list[str]:
    """What follows from all findings, in sentences; the first one says whether the model can learn here."""
    remedies = [finding.remedy for finding in findings if finding.remedy]
    if all(finding.passed for finding in findings):
        return ["This model can learn here.", *remedies]
    return ["This model cannot learn here.", *remedies, *advice(config)]


# --- the findings -----------------------------------------------------------------------------------------------------


def _questions(config: Config, episodes: Sequence[Episode]) -> Finding:
    problems = [e.question.problem for e in episodes]
    causes: list[Cause] = [_cause_of_question(e.proposal) for e in episodes if e.proposal and e.question.problem]
    distinct = len({e.question.text for e in episodes if e.question.well_formed})
    remedies: dict[Cause, str] = {
        "length": _longer(config, "max_question_tokens"),
        "form": "what the model writes is not what --proposer-prompt asks for, which must have the form "
        "<question>…</question><rationale>…</rationale>; ask in other words, or take a larger or an instruction-tuned "
        "model",
        "end": ENDLESS,
    }
    more = f", {distinct} of them different" if distinct else ", so that nothing was answered"
    return _readable("readable_questions", problems, causes, remedies, more)


def _solutions(config: Config, groups: Sequence[Episode]) -> Finding:
    sampling = config.sampling
    replies = [(trajectory, group.prompt) for group in groups for trajectory in group.trajectories]
    trajectories = [trajectory for trajectory, _ in replies]
    causes: list[Cause] = [_cause_of_solution(t, sampling.solution_form, prompt) for t, prompt in replies if t.problem]
    elsewhere = {
        form: sum(parse_trajectory(t.text, t.finish_reason, form, prompt).well_formed for t, prompt in replies)
        for form in FORMS
    }
    readable = elsewhere.pop(sampling.solution_form)
    best, count = max(elsewhere.items(), key=lambda item: item[1])
    remedies: dict[Cause, str] = {
        "length": _longer(config, "max_solution_tokens"),
        "form": "what the model writes is not what --solver-prompt asks for and --solution-form "
        f"{sampling.solution_form} reads; "
        + (
            f"with --solution-form {best}, {count} of {len(trajectories)} could be read as they are"
            if count > readable
            else "ask in other words, or take a larger or an instruction-tuned model"
        ),
        "end": ENDLESS,
    }
    return _readable("readable", [t.problem for t in trajectories], causes, remedies)


ENDLESS = (
    "the model goes on without ending its texts; take an instruction-tuned model, and see that the eos_token_id in its "
    "generation_config.json is the token that ends a turn of its chat template"
)


def _longer(config: Config, name: str) -> str:
    """What to do where texts are cut off before they have said everything."""
    return f"the model is cut off before it has said everything; raise {as_flag(name)}, which is {config.flat()[name]}"


def _readable(
    signal: Literal["readable_questions", "readable"],
    problems: Sequence[str | None],
    causes: Sequence[Cause],
    remedies: Mapping[Cause, str],
    more: str = "",
) -> Finding:
    """How many of the questions or solutions can be read; what to do if most cannot.

    Args:
        signal: whose floor decides.
        problems: of all texts; None where it could be read.
        causes: of the model's own unreadable texts. Questions from labels have none.
        remedies: what to do about each.
        more: is added to the figure.
    """
    what, read = ("questions" if signal == "readable_questions" else "solutions"), problems.count(None)
    figure, remedy = f"{read} of {len(problems)}{more}", ""
    problem, count = next(iter(Counter(p for p in problems if p).most_common(1)), ("", 0))
    if problem:
        figure += f"; what is wrong most often: {problem} ({count})"
    passed = not BOUNDS[signal].warns(read / len(problems))
    if 2 * read < len(problems):
        meaning = f"most {what} cannot be read" if passed else BOUNDS[signal].meaning
        why = f", because {remedies[Counter(causes).most_common(1)[0][0]]}" if causes else f" ({problem})"
        remedy = _sentence(meaning + why)
    return Finding(f"its {what} can be read", passed, figure, remedy)


def _ends(config: Config, proposals: Sequence[Sampled], trajectories: Sequence[Sampled]) -> Finding:
    """Whether texts end before they are cut off. What to do is said with those that cannot be read for it."""
    told, passed, sampling = [], True, config.sampling
    limits = (sampling.max_question_tokens, sampling.max_solution_tokens)
    for what, texts, limit in zip(("questions", "solutions"), (proposals, trajectories), limits, strict=True):
        if texts:
            ended = sum(text.finish_reason == "stop" for text in texts)
            passed &= not BOUNDS["readable"].warns(ended / len(texts))
            tokens = [text.num_tokens for text in texts]
            used = f"{median(tokens):g} tokens in the median and {max(tokens)} at most, of {limit} allowed"
            told.append(f"{ended} of {len(texts)} {what}; they take {used}")
    return Finding("its texts end by themselves", passed, "; and ".join(told))


def _votes(config: Config, groups: Sequence[Episode]) -> Finding:
    """Whether the answers of a group agree in part. That they all agree may pass, so it is told and no fault."""
    shares = [group.majority_fraction for group in groups]
    unanimous = sum(BOUNDS["majority_fraction"].warns(share) for share in shares)
    apart = sum(max(Counter(_keys(group)).values(), default=0) < 2 for group in groups)
    figure = f"of {len(groups)} groups with two answers or more, {unanimous} agree entirely and {apart} not at all; "
    figure += f"the most frequent answer has {100 * sum(shares) / len(shares):.0f} % of a group in the mean"
    passed, remedy = True, ""
    if apart == len(groups):
        passed = False
        remedy = "No two answers of a group agree, so that votes say nothing: have --proposer-prompt ask for questions "
        remedy += "with one short answer, or take a model that sees better."
    elif unanimous == len(groups):
        remedy = f"{_sentence(BOUNDS['majority_fraction'].meaning)} Harder questions divide it: see --proposer-prompt."
    return Finding("its answers can be voted on", passed, figure, remedy)


def _rewards(config: Config, groups: Sequence[Episode]) -> Finding:
    """Whether rewards tell a group's solutions apart, by more than their length."""
    kept = [group for group in groups if gate(config, group.majority_fraction) == "kept"]
    spreads = [pstdev(_paid_but_for_length(t) for t in group.trajectories) for group in kept]
    telling = sum(not BOUNDS["advantage_std"].warns(spread) for spread in spreads)
    earned = [reward for group in groups for reward in group.rewards]
    figure = f"in {telling} of {len(groups)} groups, by more than the length of the text; rewards from "
    figure += f"{min(earned):.3f} to {max(earned):.3f}"
    if len(kept) < len(groups):
        figure += f"; {len(groups) - len(kept)} groups are outside --gate-low and --gate-high and teach nothing"
    remedy = "" if telling else "The solutions of a group all earn the same, so that there is nothing to learn from."
    return Finding("its rewards tell solutions apart", telling > 0, figure, remedy)


# --- one text ---------------------------------------------------------------------------------------------------------


def _cause_of_question(proposal: Sampled) -> Cause:
    text = proposal.text.lower()
    return _cause(proposal, begun="<question>" in text, complete="</rationale>" in text)


def _cause_of_solution(trajectory: Sampled, form: Form, prompt: str) -> Cause:
    """Where the opening tag is not the text's own to write, a text that was cut off counts as begun."""
    problem = parse_trajectory(trajectory.text, "stop", form, prompt).problem  # as if it had ended there
    complete = problem is None or not problem.startswith("no ")
    begun = form != "tags" or opens_thought(prompt) or "<think>" in trajectory.text.lower()
    return _cause(trajectory, begun=begun, complete=complete)


def _cause(written: Sampled, *, begun: bool, complete: bool) -> Cause:
    """Why an unreadable text could not be read.

    Args:
        written: the text.
        begun: whether it begins in the form that was asked for.
        complete: whether it has all parts of this form.
    """
    if written.finish_reason == "stop" or not begun:
        return "form"
    return "end" if complete or BOUNDS["repetition"].warns(repeated_share(written.text)) else "length"


def _keys(group: Episode) -> list[str]:
    return [t.answer_key for t in group.trajectories if t.answer_key is not None]


def _paid_but_for_length(trajectory: Trajectory) -> float:
    """A trajectory's reward with what was taken off for its length given back."""
    return sum(part.weight * part.value / (part.factors.get("length") or 1.0) for part in trajectory.parts.values())


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
