"""Self-play: what a played step does, what it costs, and what it records. What a group earns is in test_scoring."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from ireasoner.method import seeds
from ireasoner.method.instructions import PROPOSER_PROMPT, SOLVER_PROMPT
from ireasoner.method.memory import step_digest
from ireasoner.method.scoring import Context, Group
from ireasoner.method.texts import parse_question, solver_messages
from ireasoner.method.types import Completion, Episode
from ireasoner.model.inputs import build_prompts, encode_images, render
from ireasoner.model.policy import Policy
from ireasoner.model.views import Pictures, View, filled
from ireasoner.rollouts.distributions import token_logprobs
from ireasoner.rollouts.live import LiveEngine
from ireasoner.training.config import Config, resolve
from ireasoner.training.items import Item
from ireasoner.training.labelled import LabelledQuestion
from ireasoner.training.selfplay import Play, SelfPlay, _Batch, at_once
from models import learner, load, teach

MakePolicy = Callable[..., Policy]
LAST = 10  # steps of the runs below


def config_of(recipe: str = "paper", **flags: Any) -> Config:
    scale = {"steps": LAST, "group_size": 3, "max_question_tokens": 24, "max_solution_tokens": 40}
    labels = {"labels": "labels.jsonl"} if recipe == "oracle" else {}
    return resolve({"images": "images", "model": "tiny", "recipe": recipe, **scale, **labels, **flags})


def selfplay(policy: Policy, config: Config | None = None) -> SelfPlay:
    return SelfPlay(policy, LiveEngine(policy), config or config_of())


def labelled(items: Sequence[Item], labels: Mapping[str, Sequence[tuple[str, str]]]) -> list[Item]:
    """The same items with labelled questions, of which one is asked."""
    found = {name: [LabelledQuestion(Path(name), *row) for row in rows] for name, rows in labels.items()}
    return [item._replace(labels=tuple(found.get(item.name, ()))) for item in items]


class Listening(LiveEngine):
    """Keeps what each role was asked."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.asked: dict[Any, list[Any]] = {"proposer": [], "solver": []}

    def sample(self, requests: Sequence[Any], role: Any, **options: Any) -> list[list[Completion]]:
        self.asked[role] += requests
        return super().sample(requests, role, **options)


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The model as it ships, not to be changed: it writes well-formed questions and trajectories."""
    return load()


@pytest.fixture(scope="module")
def babbler(make_policy: MakePolicy) -> Policy:
    """Never well-formed, never twice the same."""
    return make_policy(0.2)


def named(pictures: Sequence[Image.Image]) -> list[Item]:
    return [Item(f"{i}.png", picture, "0" * 16) for i, picture in enumerate(pictures)]


def taught(policy: Policy, play: Play) -> tuple[Any, list[Sequence[Completion]], list[tuple[float, ...]]]:
    """Prompts, completions and rewards of the solver's groups."""
    requests = [sample.request for sample in play.solver]
    prompts = build_prompts(policy, [r.image for r in requests], [r.messages for r in requests])
    rewards = [play.episodes[sample.episode].rewards for sample in play.solver]
    return prompts, [sample.completions for sample in play.solver], rewards


# --- a played step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, "Ask about {domain}."])
def test_the_proposer_reads_what_the_images_show(policy: Policy, pictures: list[Image.Image], prompt: str | None):
    given = {"proposer_prompt": prompt} if prompt else {}
    played, engine = selfplay(policy, config_of(domain="how many {dots}", **given)), Listening(policy)
    played.engine = engine
    play = played.play(1, named(pictures[:1]))
    tokenizer = policy.processor.tokenizer
    (asked,) = engine.asked["proposer"]
    ids = build_prompts(policy, [asked.image], [asked.messages]).text["input_ids"]
    (read,) = tokenizer.batch_decode(ids)
    sentence = "Ask about how many {dots}." if prompt else "The images are all of this kind: how many {dots}."
    assert sentence in " ".join(read.split())
    assert play.episodes[0].proposal is not None
    assert sentence in play.episodes[0].proposal.prompt
    assert all("dots" not in str(request.messages) for request in engine.asked["solver"])


def test_each_item_is_asked_about_as_what_it_is(policy: Policy, pictures: list[Image.Image]):
    """By the prompts that are shipped: about an image, several, and a clip, whoever asks the question."""
    views = [pictures[0], Pictures(tuple(pictures[:2])), Pictures(tuple(pictures[:2]), fps=2.0)]
    items = [Item(f"{i}.png", view, "0" * 16) for i, view in enumerate([*views, *views])]
    items = labelled(items, {f"{i}.png": [("How many?", "3")] for i in (3, 4, 5)})
    short = {"max_question_tokens": 2, "max_solution_tokens": 2, "group_size": 2}
    told = {"proposer_prompt": PROPOSER_PROMPT, "solver_prompt": SOLVER_PROMPT}
    played, engine = selfplay(policy, config_of("random-reward", **short, **told)), Listening(policy)
    played.engine = engine
    episodes = played.play(1, items).episodes
    asked = [request.prompt for role in ("proposer", "solver") for request in engine.asked[role]]
    recorded = [*(e.proposal.prompt for e in episodes if e.proposal), *(e.prompt for e in episodes[3:])]
    assert recorded == asked
    for prompt, shown in zip(asked, ["the image", "the images", "the clip"] * 2, strict=True):
        assert f"Look closely at {shown} and " in prompt


def test_a_played_step_is_complete_and_repeats(policy: Policy, pictures: list[Image.Image]):
    play = selfplay(policy).play(1, named(pictures[:3]))
    asked = [e for e in play.episodes if e.question.well_formed]
    assert len(play.episodes) == 3
    assert asked, "the shipped model wrote no readable question for any of three images"
    assert [sample.episode for sample in play.proposer] == [0, 1, 2]
    assert len(play.solver) == len(asked)
    for i, episode in enumerate(play.episodes):
        assert (episode.step, episode.image) == (1, f"{i}.png")
        assert episode.proposal is not None
        assert episode.proposal.text == play.proposer[i].completions[0].text
        size = 3 if episode.question.well_formed else 0
        assert len(episode.trajectories) == size
        assert all(set(t.parts) == {"outcome", "step_agreement"} for t in episode.trajectories)
        # What the model read, with a place for the image: the prompts of this very question.
        assert policy.processor.image_token in episode.proposal.prompt
        assert episode.question.text in episode.prompt
        assert all(0 <= reward <= 1 for reward in (*episode.rewards, episode.proposer_reward))
    # Nothing is carried: not by the player, not by torch's or numpy's generators.
    torch.manual_seed(123)
    np.random.seed(123)
    again = selfplay(load()).play(1, named(pictures[:3]))
    assert again.episodes == play.episodes
    other = selfplay(policy).play(2, named(pictures[:3]))
    assert [e.proposal for e in other.episodes] != [e.proposal for e in play.episodes]
    for sample in play.solver:
        assert [t.text for t in play.episodes[sample.episode].trajectories] == [c.text for c in sample.completions]


def test_an_image_plays_the_same_alone_and_with_others(policy: Policy, pictures: list[Image.Image]):
    batch = named([pictures[0], pictures[1].resize((112, 56)), pictures[2]])
    player = selfplay(policy)
    together = player.play(1, batch).episodes
    turned = player.play(1, batch[::-1]).episodes[::-1]
    for i, item in enumerate(batch):
        alone = player.play(1, [item]).episodes[0]
        for other in (together[i], turned[i]):
            assert alone.question == other.question
            assert [t.text for t in alone.trajectories] == [t.text for t in other.trajectories]
            assert alone.rewards == pytest.approx(other.rewards)


def test_what_was_sampled_is_what_is_trained(policy: Policy, pictures: list[Image.Image]):
    """Prompts and completions stay side by side, from play to update, where some questions went unanswered."""
    labels = {"0.png": [("How many objects are there?", "3")], "2.png": [("Which row is the longest?", "red")]}
    items = [item for item in labelled(named(pictures[:3]), labels) if item.labels]
    play = selfplay(policy, config_of("oracle")).play(1, items)
    assert [play.episodes[sample.episode].image for sample in play.solver] == ["0.png", "2.png"]
    prompts, groups, rewards = taught(policy, play)
    frozen = learner(policy, "solver", learning_rate=1e-3, max_grad_norm=1e-30)  # look, but do not touch
    frozen.optimizer = torch.optim.SGD(frozen.parameters.values(), lr=0.0)  # type: ignore[assignment]
    assert teach(frozen, prompts, groups, rewards)["sampler_gap"] < 1e-4
    assert teach(frozen, prompts, groups[::-1], rewards)["sampler_gap"] > 1e-2


def test_no_repeated_work_in_a_step(make_policy: MakePolicy, pictures: list[Image.Image], monkeypatch: Any):
    """Each image once through the image processor, all of one shape at once through the vision tower, and each prompt
    run once for each role.

    The update adds one pass over the prompts for the policy and one for the reference, and no look at the images.
    """
    policy = make_policy()
    calls: Counter[str] = Counter()
    prompt_rows: list[int] = []
    processor = type(policy.processor.image_processor)
    run_processor = processor.__call__

    def counted_processor(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        calls["processor"] += 1
        calls["images"] += len(images)
        return run_processor(self, images, *args, **kwargs)

    def count_vision(module: Any, args: Any) -> None:
        calls["vision"] += 1

    def count_prompts(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, width = kwargs["position_ids"].shape[-2:]
        mask = kwargs["attention_mask"]  # None: a shared cache has its own
        if mask is not None and width == mask.shape[1]:  # nothing is cached yet
            prompt_rows.append(rows)

    monkeypatch.setattr(processor, "__call__", counted_processor)
    policy.backbone.model.visual.register_forward_pre_hook(count_vision)
    policy.backbone.model.language_model.register_forward_pre_hook(count_prompts, with_kwargs=True)
    play = selfplay(policy).play(1, named(pictures[:3]))
    prompts, groups, rewards = taught(policy, play)
    assert groups
    assert calls == {"processor": 3, "images": 3, "vision": 1}
    assert prompt_rows == [3, len(groups)]  # the proposer's, then the solver's: rows are prompts, not trajectories
    prompt_rows.clear()
    teach(learner(policy, "solver", learning_rate=1e-4), prompts, groups, rewards)
    assert prompt_rows == [len(groups), len(groups)]  # policy, reference
    assert calls == {"processor": 3, "images": 3, "vision": 1}


def test_an_image_played_twice_in_a_step_draws_differently(babbler: Policy, pictures: list[Image.Image]):
    twice = [Item("a.png", pictures[0], "0" * 16)] * 2
    (first,), (second,) = (sample.completions for sample in selfplay(babbler).play(1, twice).proposer)
    assert first.token_ids != second.token_ids
    labels = {"a.png": [("How many objects are there?", "3")]}
    twice = labelled(twice, labels)
    samples = selfplay(babbler, config_of("oracle")).play(1, twice).solver
    assert len({c.token_ids for sample in samples for c in sample.completions}) == 6
    # The first of the two is still what it is alone.
    (alone,) = selfplay(babbler, config_of("oracle")).play(1, twice[:1]).solver
    assert [c.text for c in alone.completions] == [c.text for c in samples[0].completions]


def test_draws_differ_by_seed_step_image_occurrence_and_purpose():
    image = Image.new("RGB", (1, 1))
    items = [Item(name, image, "") for name in ("a", "a", "b", "\udcff")]  # the last is a file name that is not UTF-8
    purposes = (seeds.PROPOSE, seeds.SOLVE, seeds.RANDOM_REWARD, seeds.PICK_LABEL)
    drawn = [
        _Batch(run, step, items).seed(i, purpose)
        for run in (0, 1) for step in (1, 2) for i in range(4) for purpose in purposes
    ]  # fmt: skip
    assert len(set(drawn)) == len(drawn) == 64
    turned = items[2::-1]
    assert _Batch(0, 1, turned).seed(1, seeds.SOLVE) == _Batch(0, 1, items).seed(0, seeds.SOLVE)  # not by place


def test_unreadable_questions_are_not_solved(policy: Policy, pictures: list[Image.Image]):
    play = selfplay(policy, config_of(max_question_tokens=2)).play(1, named(pictures[:2]))  # all cut off
    assert play.solver == ()
    for episode in play.episodes:
        assert episode.question.problem == "cut off before the end token"
        assert (episode.trajectories, episode.rewards, episode.proposer_reward) == ((), (), 0.0)


def test_labels_replace_the_proposer_where_there_are_any(policy: Policy, pictures: list[Image.Image]):
    labels = {
        "0.png": [("How many objects are there?", "3"), ("How many bars are there?", "4")],
        "2.png": [("Which row is the longest?", "red")],
    }
    player, items = selfplay(policy, config_of("oracle")), labelled(named(pictures[:3]), labels)
    play = player.play(1, [items[0], items[2]])
    assert play.proposer == ()
    assert len(play.solver) == 2
    zero, two = play.episodes
    assert zero.question.text in {text for text, _ in labels["0.png"]}
    assert two.question.text == "Which row is the longest?"
    for episode in (zero, two):
        assert episode.proposal is None
        assert len(episode.trajectories) == 3
        truth = "text:red" if episode is two else f"number:{dict(labels['0.png'])[episode.question.text]}"
        assert episode.rewards == tuple(float(t.answer_key == truth) for t in episode.trajectories)
        assert episode.rewards == tuple(t.rightness for t in episode.trajectories)
    # Which label is asked is drawn anew at each step, and all of them are asked in time.
    picked = [player._asked(_Batch(0, step, items), 0, []) for step in [*range(1, 20), 1]]
    assert {asked.question.text for asked in picked} == {text for text, _ in labels["0.png"]}
    assert picked[0] == picked[-1]
    # Beside them, the proposer asks about the other image, and what it samples does not depend on them.
    mixed = selfplay(policy).play(1, items)
    assert [sample.episode for sample in mixed.proposer] == [1]
    (alone,) = selfplay(policy).play(1, [items[1]]).episodes
    assert mixed.episodes[1].question == alone.question
    assert [t.text for t in mixed.episodes[1].trajectories] == [t.text for t in alone.trajectories]
    assert [t.rightness for t in alone.trajectories] == [None] * 3


def test_the_proposer_is_shown_labelled_questions(policy: Policy, pictures: list[Image.Image]):
    examples = [LabelledQuestion(Path("0.png"), f"How many {color} bars?", "3") for color in ("red", "blue", "green")]
    config = config_of(labels="labels.jsonl", label_share=0.5, label_examples=2)
    play = SelfPlay(policy, LiveEngine(policy), config, examples).play(1, named(pictures[:3]))
    shown = [[q.question for q in examples if q.question in sample.request.prompt] for sample in play.proposer]
    assert [len(questions) for questions in shown] == [2, 2, 2]
    assert len({tuple(questions) for questions in shown}) > 1  # drawn anew for each image
    assert [e.proposal.prompt for e in play.episodes if e.proposal] == [s.request.prompt for s in play.proposer]


def test_records_of_an_episode_do_not_change(policy: Policy, pictures: list[Image.Image]):
    (episode,) = selfplay(policy).play(1, named(pictures[:1])).episodes
    with pytest.raises(ValidationError, match="frozen"):
        episode.proposer_reward = 1.0
    assert episode.model_copy(update={"proposer_reward": 1.0}).proposer_reward == 1.0


def test_a_reward_of_ones_own_gets_what_self_play_knows(policy: Policy, pictures: list[Image.Image]):
    heard: list[tuple[Group, Context]] = []

    def fn(group: Group, context: Context) -> list[float]:
        heard.append((group, context))
        return [0.25] * len(group.texts)

    config = config_of(reward="mine.py:fn", solution_form="tags")
    play = SelfPlay(policy, LiveEngine(policy), config, reward=fn).play(3, named(pictures[:3]))
    solved = [e for e in play.episodes if e.trajectories]
    assert len(heard) == len(solved) > 0
    for (group, context), episode, sample in zip(heard, solved, play.solver, strict=True):
        assert (context.image, context.form) == (episode.image, "tags")
        assert group.texts == tuple(t.text for t in episode.trajectories)
        assert context.finish_reasons == [t.finish_reason for t in episode.trajectories]
        assert context.logprobs == [c.logprobs for c in sample.completions]
        assert context.tokens is not None
        written = policy.processor.tokenizer.decode(sample.completions[0].token_ids)
        assert "".join(context.tokens[0]) == written  # the end token has a text too
        assert context.blank_logprobs is not None
        gray = encode_images(policy, [Image.new("RGB", pictures[sample.episode].size, (128, 128, 128))])[0]
        blind = token_logprobs(policy, replace(sample.request, image=gray), sample.completions, "solver", 3072)
        assert context.blank_logprobs() == blind
        assert context.blank_logprobs() is context.blank_logprobs()  # a pass is made once, whoever asks
        assert blind != [list(c.logprobs) for c in sample.completions]
        assert context.seed is not None
        assert episode.rewards == tuple(0.25 * t.well_formed for t in episode.trajectories)


def test_one_gray_image_of_each_size_is_encoded_for_a_step(policy: Policy, pictures: list[Image.Image]):
    """Also of several images together and of clips; it is to each request what one of its own would be."""
    small = tuple(picture.resize((56, 90)) for picture in pictures)
    clips = [Pictures(small[i : i + 2], fps=2.0) for i in (0, 2)]
    views: list[View] = [*pictures[:2], *small[:2], Pictures(small[:2]), Pictures(small[2:4]), *clips]
    items = [Item(f"{i}.png", view, "0" * 16) for i, view in enumerate(views)]
    items = labelled(items, {item.name: [("How many dots are there?", "3")] for item in items})
    blind: list[Any] = []

    def fn(group: Group, context: Context) -> list[float]:
        assert context.blank_logprobs is not None
        blind.append(context.blank_logprobs())
        return [0.0] * len(group.texts)

    playing = SelfPlay(policy, LiveEngine(policy), config_of(reward="mine.py:fn", max_solution_tokens=8), reward=fn)
    draft, seen = playing.begin(3, items, at_once)(), []
    hook = policy.base.visual.register_forward_hook(lambda *_: seen.append(1))
    play = playing.score(draft)
    hook.remove()
    assert len(seen) == 4
    for sample, view, found in zip(play.solver, views, blind, strict=True):
        (gray,) = encode_images(policy, [filled(view, (128, 128, 128))])
        alone = token_logprobs(policy, replace(sample.request, image=gray), sample.completions, "solver", 3072)
        for one, other in zip(found, alone, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_reward_may_ask_how_likely_a_text_is_about_another_view(policy: Policy, pictures: list[Image.Image]):
    """About the image as it is, as likely as when it was sampled; about a masked one, less likely."""
    gains: list[float] = []

    def fn(group: Group, context: Context) -> list[float]:
        assert context.likelihoods is not None
        assert context.logprobs is not None
        texts = [("", text) for text in group.texts]
        seen, masked = context.likelihoods(texts), context.likelihoods(texts, "masked")
        assert masked == context.likelihoods(texts, "masked")  # the same squares again
        for text, sampled, again, blind in zip(group.texts, context.logprobs, seen, masked, strict=True):
            ended = len(sampled) - 1  # the end token is not in the text
            assert len(again) == len(blind) == ended, text
            assert again == pytest.approx(sampled[:ended], abs=1e-4)
            gains.append(sum(again) - sum(blind))
        return [0.0] * len(texts)

    config = config_of(reward="mine.py:fn", max_solution_tokens=80)
    SelfPlay(policy, LiveEngine(policy), config, reward=fn).play(3, named(pictures[:2]))
    assert np.mean(gains) > 0.1


def test_another_view_is_asked_about_and_only_votes(policy: Policy, pictures: list[Image.Image]):
    """The solver answers as ever, and as often about a changed image, whose answers a reward may read."""
    heard: list[tuple[Group, Context]] = []

    def fn(group: Group, context: Context) -> list[float]:
        heard.append((group, context))
        return [0.25] * len(group.texts)

    items, engine = named(pictures[:2]), Listening(policy)
    own = config_of(reward="mine.py:fn", max_solution_tokens=80)
    play = SelfPlay(policy, engine, own.changed(other_view=True), reward=fn).play(3, items)
    alone = SelfPlay(policy, LiveEngine(policy), own, reward=fn).play(3, items)
    texts = [[t.text for t in episode.trajectories] for episode in play.episodes]
    assert texts == [[t.text for t in episode.trajectories] for episode in alone.episodes]
    assert sum(len(sample.completions) for sample in play.solver) == sum(map(len, texts))
    count = len(play.solver)
    as_they_are, changed = engine.asked["solver"][:count], engine.asked["solver"][count:]
    assert [r.messages for r in changed] == [r.messages for r in as_they_are]
    assert len({r.seed for r in engine.asked["solver"]}) == 2 * count
    for (_, context), as_it_is, other in zip(heard[:count], as_they_are, changed, strict=True):
        one, two = (np.asarray(request.image.seen.view, dtype=float) for request in (as_it_is, other))
        assert np.abs(one - two).mean() > 0
        (again,) = LiveEngine(policy).sample([other], "solver", n=3, max_tokens=80)
        assert context.other_view is not None
        assert context.other_view.texts == tuple(c.text for c in again)
        assert context.other_view.vote.readable > 0
    assert all(context.other_view is None for _, context in heard[count:])


def test_a_draft_about_another_view_is_kept_for_a_resumed_run(policy: Policy, pictures: list[Image.Image]):
    playing, items = selfplay(policy, config_of("co-rewarding")), named(pictures[:3])
    draft = playing.begin(3, items, at_once)()
    assert all(len(others) == len(group) for group, others in zip(draft.groups, draft.others, strict=True))
    restored = playing.restored(json.loads(json.dumps(draft.state())), [None, *items[1:]])
    assert restored is not None
    assert (restored.groups, restored.others) == (draft.groups[1:], draft.others[1:])
    assert any(restored.others)


class Scripted:
    """An engine that asks and answers the same of every image."""

    def __init__(self, question: str, solution: str) -> None:
        self.texts = {"proposer": question, "solver": solution}

    def sample(self, requests: Sequence[Any], role: Any, *, n: int = 1, **_: Any) -> list[list[Completion]]:
        return [[Completion(self.texts[role], (1,), (0.0,), "stop")] * n for _ in requests]

    def refresh(self) -> None:
        pass


class Forgetful(Scripted):
    """Leaves out the last of the groups that it is asked for."""

    def sample(self, requests: Sequence[Any], role: Any, **options: Any) -> list[list[Completion]]:
        return super().sample(requests, role, **options)[: -1 if role == "solver" else None]


def test_an_engine_that_returns_too_few_groups_is_refused(policy: Policy, pictures: list[Image.Image]):
    """The group would be missing from its episode and from what is trained, and nobody would see it."""
    engine = Forgetful("<question>How many dots are there?</question>", "\\boxed{3}")
    with pytest.raises(ValueError, match="zip"):
        SelfPlay(policy, engine, config_of()).play(1, named(pictures[:2]))


def test_a_group_is_scored_beside_what_was_said_of_other_images(policy: Policy, pictures: list[Image.Image]):
    """The claims of the other images alone, in the run's own form; truncated steps look alike from their start."""
    heard: list[Context] = []

    def fn(group: Group, context: Context) -> list[float]:
        assert group.answer_keys == ("number:3",) * 3
        heard.append(context)
        return [0.5] * 3

    engine = Scripted("<question>How many dots are there?</question>", "Step 1: There are three dots.\n\n\\boxed{3}")
    config = config_of(reward="mine.py:fn", solution_form="boxed")
    config = config.model_copy(
        update={"recipe": config.recipe.model_copy(update={"recurrence_window": 8, "max_step_tokens": 4})}
    )
    SelfPlay(policy, engine, config, reward=fn).play(2, named(pictures[:3]))
    assert [context.image for context in heard] == ["0.png", "1.png", "2.png"]
    batch = _Batch(config.seed, 2, named(pictures[:3]))
    for i, context in enumerate(heard):
        assert context.recent_steps == [frozenset({step_digest("There are three dots.")})] * 2
        assert context.seed == batch.seed(i, seeds.RANDOM_REWARD)
        assert context.embed is not None
        same, longer, other = context.embed(["red red red red blue", "red red red red red and blue", "blue"])
        assert np.allclose(same, longer, atol=1e-6)
        assert not np.allclose(same, other, atol=1e-3)


def test_an_episode_reads_back_as_it_was_written(policy: Policy, pictures: list[Image.Image]):
    for episode in selfplay(policy, config_of("default")).play(1, named(pictures[:3])).episodes:
        assert Episode.model_validate_json(episode.model_dump_json()) == episode


def test_an_image_token_in_a_question_is_no_second_image(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch):
    """Some models' image token is no markup, so that such a question is readable; it is asked without the token."""
    policy = make_policy()
    token = policy.processor.image_token
    monkeypatch.setattr(policy.processor, "image_token", "[IMG]")
    monkeypatch.setattr(policy.processor, "chat_template", policy.processor.chat_template.replace(token, "[IMG]"))
    asked = render(policy.processor, solver_messages("{question}", "What is in [IMG]?"))
    assert parse_question("<question>What is in [IMG]?</question>").well_formed
    assert asked.count("[IMG]") == 1
    assert "What is in ?" in asked
