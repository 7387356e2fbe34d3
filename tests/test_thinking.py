"""Chat templates of thinking models: thinking is switched off where they can, and an opened thought is read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ireasoner.method.scoring import Context, score_group
from ireasoner.method.texts import opens_thought, parse_question, parse_trajectory, solver_messages
from ireasoner.method.types import Completion, Role
from ireasoner.model.backbone import load_processor
from ireasoner.model.inputs import encode_images, render
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Request
from ireasoner.training.config import resolve
from ireasoner.training.evaluation import evaluate
from ireasoner.training.items import Item
from ireasoner.training.labelled import LabelledQuestion
from ireasoner.training.probes import solve_greedily
from ireasoner.training.selfplay import SelfPlay

MakePolicy = Callable[..., Policy]
CLOSED = "<think>\n\n</think>\n\n"

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}AFTER<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nTHOUGHT{% endif %}"
)


def template(thought: str, after: str = "") -> str:
    """A chat template with one way to deal with a thought in the generation prompt, and in the user's turn."""
    return TURNS.replace("THOUGHT", thought).replace("AFTER", after)


# How the families' templates deal with a thought: written anew, in the form that each of them has.
ALWAYS_OPEN = template("<think>\n")  # Qwen3-VL-Thinking, QwQ, DeepSeek-R1's distillates
OFF = "enable_thinking is defined and enable_thinking is false"
ON = "enable_thinking is defined and enable_thinking is true"
FAMILIES = {  # the template, and how the rendered prompt ends after the assistant's turn has begun
    "no thought": (template(""), ""),  # Qwen2.5-VL, Qwen3-VL-Instruct
    "always open": (ALWAYS_OPEN, "<think>\n"),
    "off or left to the model": (template(f"{{% if {OFF} %}}{CLOSED}{{% endif %}}"), CLOSED),  # Qwen3, SmolLM3
    "off or open": (template(f"{{% if {OFF} %}}{CLOSED}{{% else %}}<think>\n{{% endif %}}"), CLOSED),  # Qwen3.5, 3.6
    "on or closed": (template(f"{{% if {ON} %}}<think>\n{{% else %}}{CLOSED}{{% endif %}}"), CLOSED),  # small Qwen3.5
    "three ways": (  # MiniCPM
        template(
            "{% if enable_thinking is defined %}{% if enable_thinking is false %}" + CLOSED + "{% elif enable_thinking "
            "is true %}<think>\n{% endif %}{% endif %}"
        ),
        CLOSED,
    ),
    "another name": (  # Kimi K2.5
        template("{% if thinking is defined and thinking is false %}<think></think>{% else %}<think>{% endif %}"),
        "<think></think>",
    ),
    "on by another name": (  # DeepSeek-V3.1
        template("{% if not thinking %}</think>{% else %}<think>{% endif %}"),
        "</think>",
    ),
    "in the question too": (  # GLM-4.5V
        template(
            "{{ '<think></think>\n' if (enable_thinking is defined and not enable_thinking) else '' }}",
            "{{ '/nothink' if (enable_thinking is defined and not enable_thinking) else '' }}",
        ),
        "<think></think>\n",
    ),
    "a default of its own": (  # Nemotron
        template(
            "{% set on = enable_thinking if enable_thinking is defined else True %}{% if on %}<think>\n{% else %}"
            "<think></think>{% endif %}"
        ),
        "<think></think>",
    ),
}


def with_template(processor: Any, chat_template: str) -> Any:
    processor = copy.copy(processor)
    processor.chat_template = chat_template
    return processor


@pytest.mark.parametrize("family", FAMILIES)
def test_thinking_is_switched_off_where_the_template_can(family: str) -> None:
    chat_template, ending = FAMILIES[family]
    processor = with_template(load_processor("tiny"), chat_template)
    prompt = render(processor, solver_messages("{question}", "How many?"))
    assert prompt.partition("<|im_start|>assistant\n")[2] == ending
    assert ("/nothink" in prompt) == (family == "in the question too")
    assert opens_thought(prompt) == (family == "always open")
    # Whatever the template does, a reply that goes on from there is read, and one that writes its own tags too.
    own = "<think>\nStep 1: Red is 7.\nStep 2: Blue is 3.\n</think>\n<answer>4</answer>"
    continued = own.removeprefix("<think>") if opens_thought(prompt) else own
    empty = f"\n</think>\n\n{own}" if opens_thought(prompt) else CLOSED + own  # an empty thought of its own
    for text in (own, continued, empty):
        read = parse_trajectory(text, prompt=prompt)
        assert (read.problem, read.answer) == (None, "4")
        assert read.reasoning_steps == ("Red is 7.", "Blue is 3.")


class Fixed:
    """An engine whose replies are given, in turns."""

    def __init__(self, question: str, solutions: list[str]) -> None:
        self.question, self.solutions = question, solutions

    def sample(
        self, requests: Any, role: Role | None, *, n: int = 1, max_tokens: int, temperature: float = 1.0
    ) -> list[list[Completion]]:
        texts = [self.question] if role == "proposer" else self.solutions[:n]
        return [[Completion(text, (5, 6), (-0.1, -0.1), "stop") for text in texts] for _ in requests]

    def refresh(self) -> None:
        pass


SOLUTIONS = [
    "Red is 7. Blue is 3.\n</think>\n<answer>4</answer>",
    "Let me look.\n</think>\n\n<think>\nStep 1: Red is 7.\nStep 2: Blue is 3.\n</think>\n<answer>4</answer>",
    "Red is 7, and then the <answer> ends.\n",
]


def test_self_play_reads_thoughts_that_the_template_has_opened(
    make_policy: MakePolicy, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    monkeypatch.setattr(policy, "processor", with_template(policy.processor, ALWAYS_OPEN))
    config = resolve({"images": "images", "model": "tiny", "group_size": 3})
    question = "I could <question>ask</question>.\n</think>\n<question>How much more is red?</question>"
    played = SelfPlay(policy, Fixed(question, SOLUTIONS), config).play(1, [Item("a.png", pictures[0], "0" * 16)])
    (episode,) = played.episodes
    assert episode.question.text == "How much more is red?"
    assert [t.problem for t in episode.trajectories] == [None, None, "no closed <think>"]
    assert [t.reasoning_steps for t in episode.trajectories][:2] == [("Red is 7.", "Blue is 3.")] * 2
    assert episode.majority_answer is not None
    # What is recorded is all that it takes to read them again in the same way.
    assert episode.proposal is not None
    assert opens_thought(episode.prompt)
    assert parse_question(episode.proposal.text, "stop", episode.proposal.prompt) == episode.question
    texts = [t.text for t in episode.trajectories]
    for trajectory in episode.trajectories:
        again = parse_trajectory(trajectory.text, trajectory.finish_reason, "tags", episode.prompt)
        assert dict(again).items() <= dict(trajectory).items()
    question, recipe = episode.question.text, config.recipe
    for prompt, readable in ((episode.prompt, 2), (None, 1)):
        context = Context(step_weight=0.0, recent_steps=[], prompt=prompt)
        assert score_group(question, texts, recipe, context).vote.readable == readable


def test_the_evaluation_reads_thoughts_that_the_template_has_opened(
    make_policy: MakePolicy, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = make_policy()
    pictures[0].save(tmp_path / "a.png")
    questions = [LabelledQuestion(tmp_path / "a.png", "How much more is red?", "4")]
    sampling = resolve({"images": "images", "model": "tiny"}).sampling
    engine = Fixed("", SOLUTIONS[:1] * 5)
    for chat_template, readable in ((ALWAYS_OPEN, 1.0), (template(""), 0.0)):
        monkeypatch.setattr(policy, "processor", with_template(policy.processor, chat_template))
        scores = evaluate(policy, questions, "solver", sampling, engine=engine)
        assert [scores.measures["greedy"], scores.measures["strict_mean@1"], scores.well_formed] == [[readable]] * 3


def test_probes_read_thoughts_that_the_template_has_opened(
    make_policy: MakePolicy, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    monkeypatch.setattr(policy, "processor", with_template(policy.processor, ALWAYS_OPEN))
    run: Any = SimpleNamespace(config=resolve({"images": "images", "model": "tiny"}), engine=Fixed("", SOLUTIONS))
    ((_, solution),) = solve_greedily(run, encode_images(policy, pictures[:1]), ["How much more is red?"])
    assert (solution.problem, solution.answer) == (None, "4")


def test_a_request_tells_the_prompt_that_the_model_reads(
    make_policy: MakePolicy, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    monkeypatch.setattr(policy, "processor", with_template(policy.processor, ALWAYS_OPEN))
    (image,) = encode_images(policy, pictures[:1])
    messages = solver_messages("{question}", "How many?")
    assert Request(image, messages).prompt == render(policy.processor, messages)
    assert opens_thought(Request(image, messages).prompt)
