"""The report: a page from the run directory alone, in which whatever a model wrote stays text."""

from __future__ import annotations

import base64
import io
import json
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ireasoner.config import dump_config, resolve
from ireasoner.recorder import Recorder, episode_record, write_json
from ireasoner.report import write_report
from ireasoner.types import Completion, Episode, Question, StepScore, Trajectory

VOID = {"img", "br", "meta", "link", "input", "hr"}
HOSTILE = (
    "<script>alert(1)</script>",
    "</style></head><script src=//evil></script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ config }} {% for x in y %} {{ 7 * 7 }}",
    "<!-- --><iframe src=javascript:alert(1)></iframe>",
    "</title></div></article><b>bold</b>&lt;script&gt; &amp;lt; \x00 \u202e \ud800",
)


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and whether what opens also closes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.source = "", [], page.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing that is open"

    def handle_data(self, data: str) -> None:
        self.text += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == "img"]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    """A run directory that holds nothing but its config."""
    recorder = Recorder(tmp_path / "run")
    recorder.write_text("config.yaml", dump_config(resolve({"images": "/pictures", "model": "tiny", "steps": 3})))
    return recorder


def episode(text: str = "7", step: int = 1, question: str = "How many?") -> dict[str, Any]:
    """A recorded episode of two readable trajectories and an unreadable one."""
    trajectories = (
        Trajectory((f"I see {text}.", "So it is."), text, 8, None),
        Trajectory(("Another.",), text, 4, None),
        Trajectory((), None, 4, f"no closed <think>: {text}"),
    )
    return episode_record(
        Episode(
            step=step, image=f"{text}.png", question=Question(question, text, None),
            question_completion=Completion(text, (1, 2), (-0.5, -0.25), "stop"), proposer_reward=0.125,
            trajectories=trajectories, completions=(Completion(text, (3,), (-1.0,), "stop"),) * 3,
            answer_keys=("k", "k", None), majority_answer="k", majority_fraction=2 / 3, answer_entropy=0.0,
            rewards=(0.75, 0.5, 0.0), reward_parts={"outcome": (0.75, 0.5, 0.0), "step_agreement": (0.25, 0.5, 0.0)},
            step_weight=0.5, step_scores=((StepScore(0.5, 0.0, 0.5),) * 2, (StepScore(0.25, 0.0, 0.25),), ()),
            true_answer=None,
        )
    )  # fmt: skip


METRICS = {
    "reward/solver/total": 0.5, "reward/solver/outcome": 0.6, "reward/solver/step_agreement": 0.4,
    "reward/proposer/total": 0.3, "answers/majority_fraction": 0.7, "answers/entropy": 0.8, "kl/solver": 0.01,
    "kl/proposer": 0.0, "length/solver": 30.0, "length/proposer": 12.0, "well_formed/solver": 1.0,
    "well_formed/proposer": 1.0, "questions/distinct": 0.9,
}  # fmt: skip


def report(recorder: Recorder) -> Page:
    return Page(write_report(recorder.run_dir))


def with_metrics(recorder: Recorder, steps: int = 3) -> Recorder:
    for step in range(1, steps + 1):
        recorder.metrics(step, METRICS)
    return recorder


# --- text stays text --------------------------------------------------------------------------------------------------


def test_what_a_model_wrote_stays_text(recorder: Recorder):
    with_metrics(recorder)
    for text in HOSTILE:
        recorder.episode(episode(text, question=text))
        recorder.probe(
            {"step": 0, "image": text, "question": text, "text": text, "answer": text, "reasoning_steps": [text]}
        )
        recorder.skip(1, text, text)
    page = report(recorder)
    assert not page.tags() & {"script", "iframe", "b", "object", "embed", "base", "form", "link"}
    assert page.source.lower().count("<style") == 1
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:image/png;base64,").startswith("data:image/png;base64,")
    for text in HOSTILE:
        shown = text.replace("\x00", "").encode("utf-8", "backslashreplace").decode("utf-8")
        text_of_page = page.text.replace("\x00", "").replace("\ufffd", "")
        assert text_of_page.count(shown) >= 8  # the question, steps, answers and a problem; probe; skip


def test_options_and_the_runs_name_stay_text(tmp_path: Path):
    name = "<script>alert(1)<" + "title>{{ name }}"
    recorder = Recorder(tmp_path / name)
    flags = {"images": "/<img src=x>", "model": "tiny", "proposer_prompt": "</table><script>alert(2)</script>"}
    recorder.write_text("config.yaml", dump_config(resolve(flags)))
    page = report(with_metrics(recorder))
    assert "script" not in page.tags()
    assert "</table><script>alert(2)</script>" in page.text
    assert "/<img src=x>" in page.text
    assert page.text.count(name) == 2  # title and heading


def test_the_page_forbids_itself_scripts_and_the_network(recorder: Recorder):
    page = report(with_metrics(recorder))
    policies = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "http:" not in page.source
    assert "https:" not in page.source


# --- what is on the page ----------------------------------------------------------------------------------------------


def test_an_episode_shows_question_votes_and_rewards(recorder: Recorder):
    with_metrics(recorder).episode(episode("blue", question="Which one?"))
    page = report(recorder)
    for text in ("Which one?", "I see blue.", "So it is.", "reward 0.750", "outcome 0.750", "step agreement 0.250"):
        assert text in page.text
    assert "no closed <think>: blue" in page.text  # of the unreadable one its problem
    classes = [attributes.get("class") for _, attributes in page.elements]
    assert classes.count("trajectory majority") == 2
    assert classes.count("trajectory") == 1


def test_an_unreadable_question_shows_why(recorder: Recorder):
    nothing = Episode(
        step=1, image="a.png", question=Question("", "", "no closed <question>"),
        question_completion=Completion("?", (1,), (-1.0,), "stop"), proposer_reward=0.0, trajectories=(),
        completions=(), answer_keys=(), majority_answer=None, majority_fraction=0.0, answer_entropy=0.0, rewards=(),
        reward_parts={"outcome": (), "step_agreement": ()}, step_weight=0.5, step_scores=(), true_answer=None,
    )  # fmt: skip
    with_metrics(recorder).episode(episode_record(nothing))
    assert "no closed <question>" in report(recorder).text


def test_the_last_episodes_come_newest_first(recorder: Recorder):
    for step in range(1, 21):
        recorder.episode(episode(question=f"Question of step {step}."))
    text = report(with_metrics(recorder)).text
    places = [text.find(f"Question of step {step}.") for step in range(20, 8, -1)]
    assert -1 not in places
    assert places == sorted(places)
    assert "Question of step 8." not in text


def test_probes_are_told_image_by_image_through_training(recorder: Recorder):
    for step in (0, 2):
        for image in ("a.png", "b.png"):
            answer = f"{image} at {step}" if step else None
            record = {"image": image, "question": f"What of {image}?", "text": "", "answer": answer}
            recorder.probe({"step": step, "reasoning_steps": ["One.", "Two."], **record})
    text = " ".join(report(with_metrics(recorder)).text.split())
    assert text.index("What of a.png?") < text.index("a.png at 2") < text.index("What of b.png?")
    assert text.count("What of a.png?") == 1
    assert text.count("unreadable") == 2
    assert "One. · Two." in text


def test_skipped_images_and_every_option_are_listed(recorder: Recorder):
    recorder.skip(1, "sub/broken.jpg", "the file is empty")
    text = report(with_metrics(recorder)).text
    assert "sub/broken.jpg: the file is empty" in text
    for name in ("learning_rate", "outcome_exponent", "solver_prompt"):
        assert name in text


def test_before_and_after_are_shown_with_their_intervals(recorder: Recorder):
    def cell(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}

    before, after = ({"questions": 64, "greedy": cell(mean)} for mean in (0.25, 0.5))
    summary = {"before": before, "after": after, "difference": {"greedy": cell(0.25) | {"p": 0.0123}}}
    recorder.write_text("summary.json", write_json(summary))
    text = report(with_metrics(recorder)).text
    for shown in ("greedy", "0.250 [0.125, 0.375]", "0.500 [0.375, 0.625]", "0.0123", "64 held-out questions"):
        assert shown in " ".join(text.split())


@pytest.mark.parametrize("summary", [None, {"before": None, "after": None, "difference": None, "steps": 3}])
def test_without_labels_no_accuracy_is_claimed(recorder: Recorder, summary: dict[str, Any] | None):
    if summary:
        recorder.write_text("summary.json", write_json(summary))
    text = report(with_metrics(recorder)).text
    assert "--eval-data" in text
    assert "not accuracy" in text


# --- pictures ---------------------------------------------------------------------------------------------------------


def pixels(attributes: dict[str, str | None]) -> np.ndarray:
    kind, _, data = (attributes["src"] or "").partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGB"))


def test_thumbnails_and_curves_are_inside_the_page(recorder: Recorder):
    red = Image.new("RGB", (84, 84), "red")
    thumbnail = recorder.thumbnail(red, "0" * 16)
    with_metrics(recorder).episode({**episode(), "thumbnail": thumbnail})
    recorder.probe(
        {"step": 0, "image": "a", "question": "q", "answer": "1", "reasoning_steps": [], "thumbnail": thumbnail}
    )
    curves, *thumbnails = report(recorder).images()
    assert curves["class"] == "curves"
    assert min(pixels(curves).shape[:2]) > 300
    assert [np.array_equal(pixels(image), np.asarray(red)) for image in thumbnails] == [True, True]
    with Image.open(recorder.run_dir / "curves.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), pixels(curves))


def test_nothing_outside_the_runs_own_images_is_read(recorder: Recorder, tmp_path: Path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"the secret of the house")
    (recorder.run_dir / "images" / "link.png").symlink_to(secret)
    places = (
        "../secret.png",
        str(secret),
        "images/../../secret.png",
        "images/link.png",
        "config.yaml",
        "",
        "images",
        7,
        None,
    )
    with_metrics(recorder)
    for place in places:
        recorder.episode({**episode(), "thumbnail": place})
    page = report(recorder)
    assert f"The last {len(places)} episodes" in page.text
    assert base64.b64encode(b"the secret of the house").decode() not in page.source
    assert len(page.images()) == 1  # the curves


# --- runs that are not whole ------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out(recorder: Recorder):
    with_metrics(recorder).episode(episode(question="A whole one."))
    with (recorder.run_dir / "episodes.jsonl").open("ab") as file:
        file.write(json.dumps(episode(question="A torn one.")).encode()[:-20])
    text = report(recorder).text
    assert "A whole one." in text
    assert "A torn one." not in text


def test_a_damaged_line_is_left_out_with_a_warning(recorder: Recorder):
    with_metrics(recorder).episode(episode(question="A whole one."))
    with (recorder.run_dir / "episodes.jsonl").open("ab") as file:
        file.write(b"\x00\x00\x00\n")
    with pytest.warns(UserWarning, match="line 2"):
        page = report(recorder)
    assert "A whole one." in page.text


def report_quietly(recorder: Recorder) -> Page:
    with warnings.catch_warnings():  # of matplotlib's, about which there is a test of its own
        warnings.filterwarnings("ignore", message="No artists with labels", category=UserWarning)
        return report(recorder)


def test_a_run_that_has_not_begun_has_a_page(recorder: Recorder):
    page = report_quietly(recorder)
    assert "The last 0 episodes" in page.text
    assert len(page.images()) == 1


def test_metrics_that_are_missing_or_not_finite_are_left_out(recorder: Recorder):
    recorder.metrics(1, {"reward/solver/total": 0.5, "kl/solver": float("nan")})
    recorder.metrics(2, {"reward/solver/total": float("inf")})
    assert len(report_quietly(recorder).images()) == 1


def test_a_panel_without_a_curve_makes_no_noise(recorder: Recorder):
    recorder.metrics(1, {name: value for name, value in METRICS.items() if not name.startswith("kl/")})
    report(recorder)


def test_the_page_can_be_written_again(recorder: Recorder):
    with_metrics(recorder, 1).episode(episode(question="The first."))
    first = write_report(recorder.run_dir)
    recorder.episode(episode(question="The second.", step=2))
    assert write_report(recorder.run_dir) == first == recorder.run_dir / "report.html"
    assert "The second." in Page(first).text
