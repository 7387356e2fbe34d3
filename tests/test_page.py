"""The page about a run, as one file: five questions answered from the run directory; a model's text stays text."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ireasoner.method.answers import answer_key
from ireasoner.method.recipe import Recipe
from ireasoner.method.types import Episode, UsageError
from ireasoner.page import write_report
from ireasoner.page.curves import (
    MOST_POINTS,
    PANELS,
    Chart,
    chart,
    draw_svg,
    limits,
    overlay,
    panels,
    panels_together,
    readings,
    smooth,
    thin,
)
from ireasoner.page.gallery import average_agreement, select, stretches
from ireasoner.page.page import IN_REPORT, NoSuchEpisodeError, Page, Query
from ireasoner.page.run import RecordedRun
from ireasoner.page.terms import advantage_terms, proposer_term, reward_terms
from ireasoner.page.verdict import Figure, figures, verdict
from ireasoner.playground import dataset, world
from ireasoner.playground.truth import read_truth, truth_beside
from ireasoner.training.config import load_config, names, resolve
from ireasoner.training.recorder import write_json
from ireasoner.training.watch import Watch
from runs import HOSTILE, METRICS, HandMade, episode, new_run, played_run, probe, unreadable, with_metrics

VOID = {"img", "br", "meta", "link", "input", "hr"}


class Parsed(HTMLParser):
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
        self.text += " " if tag in ("td", "th", "li") else ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing that is open"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.text += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def thumbnails(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == "img" and attributes.get("class") == "thumb"]


@pytest.fixture
def recorder(tmp_path: Path) -> HandMade:
    return new_run(tmp_path / "run")


def report(recorder: HandMade) -> Parsed:
    """The page in a file of its own: then no PNG is drawn beside it."""
    return Parsed(write_report(recorder.run_dir, recorder.run_dir / "page.html"))


def charts(run: RecordedRun) -> list[Chart]:
    return [chart(run, panel) for panel in panels(run)]


def flat(text: str) -> str:
    return " ".join(text.split())


# --- text stays text --------------------------------------------------------------------------------------------------


def test_what_a_model_wrote_stays_text(recorder: HandMade):
    with_metrics(recorder)
    for text in HOSTILE:
        recorder.episode(episode(text, question=text))
        recorder.episode(unreadable(text=text))
        recorder.probe(probe(0, text, text, question=text, reasoning_steps=[text]))
        recorder.skip(1, text, text)
        recorder.event(1, text)
    page = report(recorder)
    assert not page.tags() & {"iframe", "b", "object", "embed", "base", "link"}
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "readings"}, {}]  # the page's own
    assert page.source.lower().count("<style") == 1
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    for text in HOSTILE:
        shown = text.replace("\x00", "").replace("\ud800", "?")
        assert page.text.replace("\x00", "").replace("\ufffd", "").replace("\\ud800", "?").count(shown) >= 9


def test_options_and_the_runs_name_stay_text(tmp_path: Path):
    name = "<script>alert(1)<" + "title>{{ name }}"
    flags = {"images": "/<img src=x>", "proposer_prompt": "</table><script>alert(2)</script>"}
    page = report(with_metrics(new_run(tmp_path / name, **flags)))
    assert "</table><script>alert(2)</script>" in page.text
    assert "/<img src=x>" in page.text
    assert page.text.count(name) == 2  # title and heading


def test_the_page_allows_its_own_style_and_script_and_no_network(recorder: HandMade):
    page = report(with_metrics(recorder))
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    digest = r"'sha256-[\w+/]{43}='"
    assert re.fullmatch(rf"default-src 'none'; img-src data:; style-src {digest}; script-src {digest}", policy or "")
    addresses = set(re.findall(r"https?://[^\s\"'<>)]*", page.source))
    assert addresses == set()


# --- Is it working? ---------------------------------------------------------------------------------------------------


def cell(mean: float, half: float = 0.125) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def scored(recorder: HandMade, **differences: float) -> HandMade:
    before = {"questions": 64, "images": 32, **{name: cell(0.25) for name in differences}}
    after = {"questions": 64, **{name: cell(0.25 + change) for name, change in differences.items()}}
    difference = {name: cell(change) | {"p": 0.0123} for name, change in differences.items()}
    recorder.write_text("summary.json", write_json({"before": before, "after": after, "difference": difference}))
    return with_metrics(recorder)


def test_before_and_after_are_shown_with_their_intervals(recorder: HandMade):
    text = flat(report(scored(recorder, greedy=0.25)).text)
    for shown in ("greedy", "25.0 [12.5, 37.5]", "50.0 [37.5, 62.5]", "+25.0 [+12.5, +37.5]", "0.0123", "64 held-out"):
        assert shown in text


@pytest.mark.parametrize(
    ("differences", "tone", "said"),
    [
        ({"greedy": 0.25}, "good", "got better: greedy accuracy 25.0 % → 50.0 % (+25.0 points, 95 % interval +12.5 to"),
        ({"greedy": -0.25}, "bad", "got worse"),
        ({"greedy": 0.1}, "unsure", "No difference is shown: greedy accuracy"),
        ({"greedy": 0.25, "maj@5": 0.1}, "good", "Of the other measures, maj@5 did not clearly move."),
        ({"greedy": 0.25, "maj@5": 0.2, "pass@5": -0.25}, "good", "Of the other measures, maj@5 rose; pass@5 fell."),
        ({"greedy": 0.1, "pass@5": 0.25}, "unsure", "Of the other measures, pass@5 rose."),  # one of many may by chance
        ({"mean@1": 0.25}, "good", "got better: mean@1"),
    ],
)
def test_the_verdict_follows_the_intervals(recorder: HandMade, differences: dict[str, float], tone: str, said: str):
    found = verdict(RecordedRun.open(scored(recorder, **differences).run_dir))
    assert found.tone == tone
    assert said in found.sentence


def judged(recorder: HandMade, accuracy: tuple[float, float], readable: tuple[float, float], **strict: float) -> str:
    """The verdict's sentence on greedy accuracy and the readable share before and after; strictly, it is `strict`."""
    parts: dict[str, Any] = {}
    for name, right, read in zip(("before", "after"), accuracy, readable, strict=True):
        parts[name] = {"questions": 64, "images": 32, "greedy": cell(right), "greedy_well_formed": read}
        parts[name] |= {"strict_greedy": cell(strict.get(name, right))}
    changes = {"greedy": accuracy[1] - accuracy[0]}
    changes["strict_greedy"] = strict.get("after", accuracy[1]) - strict.get("before", accuracy[0])
    difference = {name: cell(change, 0.02) | {"p": 0.01} for name, change in changes.items()}
    recorder.write_text("summary.json", write_json({**parts, "difference": difference}))
    return verdict(RecordedRun.open(with_metrics(recorder).run_dir)).sentence


@pytest.mark.parametrize(
    ("accuracy", "readable", "said"),
    [
        # Half of the readable texts are right before and after: all of the gain is reading.
        (
            (0.4, 0.5),
            (0.8, 1.0),
            "(+10.0 points, of which +10.0 because more texts can be read (80.0 % → 100.0 %), 95 %",
        ),
        # 0.4 / 0.8 = 0.5 and 0.72 / 0.9 = 0.8 of the readable ones: their mean 0.65 times 0.1.
        ((0.4, 0.72), (0.8, 0.9), "(+32.0 points, of which +6.5 because more texts can be read"),
        ((0.5, 0.5), (1.0, 0.625), "(+0.0 points, of which -24.4 because fewer texts can be read"),  # 0.375 * 0.65
        ((0.0, 0.45), (0.0, 0.9), "(+45.0 points, of which +45.0 because more texts can be read"),
        ((0.4, 0.5), (0.9, 0.9), "(+10.0 points, 95 % interval"),
        ((0.0, 0.0), (0.0, 0.0), "(+0.0 points, 95 % interval"),
    ],
)
def test_a_gain_in_format_is_told_from_a_gain_in_skill(
    recorder: HandMade, accuracy: tuple[float, float], readable: tuple[float, float], said: str
):
    sentence = judged(recorder, accuracy, readable)
    assert said in sentence
    assert "strict" not in sentence  # it would say the same again


def test_the_strict_accuracy_is_told_where_it_is_another(recorder: HandMade):
    sentence = judged(recorder, (0.4, 0.5), (1.0, 1.0), before=0.1, after=0.3)
    assert "got better: greedy accuracy 40.0 % → 50.0 %" in sentence
    assert sentence.endswith("Judged strictly, it is 10.0 % → 30.0 % (+20.0 points, +18.0 to +22.0).")
    assert "strict greedy" not in sentence  # it is no further measure
    assert "strict greedy" in report(recorder).text


def test_three_numbers_stand_first(recorder: HandMade):
    """Without held-out questions, the reward stands for it. A sign of trouble marks its number."""
    assert figures(RecordedRun.open(recorder.run_dir)) == []
    run = RecordedRun.open(with_metrics(recorder).run_dir)
    assert [(figure.name, figure.value, figure.tone) for figure in figures(run)] == [
        ("solver's reward", "0.500", None), ("majority fraction", "70.0 %", None),
        ("well-formed answers", "100.0 %", None),
    ]  # fmt: skip
    run = RecordedRun.open(scored(recorder, greedy=0.25).run_dir)
    assert figures(run)[0] == Figure(
        "greedy accuracy, held out", "50.0 %", "25.0 % before: +25.0 points [+12.5, +37.5]", "good"
    )
    assert len(figures(run)) == 3
    collapsed = signal_run(recorder.run_dir.parent / "bad", {"majority_fraction": 0.99})
    assert [figure.tone for figure in figures(collapsed)] == [None, "bad", None]


@pytest.mark.parametrize("summary", [None, {"before": None, "after": None, "difference": None, "steps": 3}])
def test_without_labels_no_accuracy_is_claimed(recorder: HandMade, summary: dict[str, Any] | None):
    if summary:
        recorder.write_text("summary.json", write_json(summary))
    page = report(with_metrics(recorder))
    assert "--eval-data" in page.text
    assert "nothing here is accuracy" in page.text
    assert "got better" not in page.text


def signal_run(path: Path, late: dict[str, float], steps: int = 60, **options: Any) -> RecordedRun:
    """A run with a window of 10 whose signals change after its half."""
    healthy = {"majority_fraction": 0.6, "answer_entropy": 0.9, "readable": 1.0, "distinct_questions": 0.9}
    recorder = new_run(path, steps=steps, **options)
    for step in range(1, steps + 1):
        values = healthy | (late if step > steps // 2 else {})
        recorder.metrics(step, METRICS | {f"watch/{name}": value for name, value in values.items()})
    return RecordedRun.open(path)


def test_healthy_signs_are_no_proof(tmp_path: Path):
    run = signal_run(tmp_path / "run", {"majority_fraction": 0.7})
    found = verdict(run)
    assert (found.tone, found.sentence.split(":")[0]) == ("unsure", "No sign of trouble")
    (note,) = (note for note in found.notes if "cannot tell a right consensus from a wrong one" in note)
    assert "ireasoner label RUN" in note
    assert all(sign.trouble is None for sign in run.watch.signs())


@pytest.mark.parametrize(
    ("late", "tone", "meaning"),
    [
        ({"majority_fraction": 0.99}, "bad", "the group agrees whatever is asked (majority fraction 0.6 → 0.99)"),
        ({"answer_entropy": 0.41}, "unsure", "answers lose their diversity"),
        ({"readable": 0.5}, "bad", "texts can no longer be read"),
        ({"distinct_questions": 0.2}, "bad", "the same questions come again and again"),
    ],
)
def test_a_run_that_goes_wrong_says_how(tmp_path: Path, late: dict[str, float], tone: str, meaning: str):
    found = verdict(signal_run(tmp_path / "run", late))
    assert found.tone == tone
    assert meaning in found.sentence


def test_under_labels_agreement_is_no_sign_of_trouble(tmp_path: Path):
    run = signal_run(tmp_path / "run", {"majority_fraction": 0.99}, recipe="oracle", labels="/labels.jsonl")
    assert verdict(run).tone == "unsure"
    assert "paid for true answers" in verdict(run).sentence
    assert run.watch.signs() == []


def test_the_page_and_the_watch_say_the_same(tmp_path: Path):
    """Of noise around a level that holds, and of agreement that is won and lost, at every tenth step."""
    rng = np.random.default_rng(0)
    recorder = new_run(tmp_path / "run", steps=200)
    run, watch, told = RecordedRun.open(recorder.run_dir), Watch(load_config(recorder.run_dir / "config.yaml")), set()
    for step in range(1, 201):
        level = 0.6 if step < 80 else 0.9 if step < 140 else 0.55
        values = {"majority_fraction": float(np.clip(rng.normal(level, 0.1), 0, 1)), "readable": 1.0}
        recorder.metrics(step, METRICS | {f"watch/{name}": value for name, value in values.items()})
        watch.observe(step, {**values, "blank_survival": 0.3, "distinct_questions": 0.9})
        if step % 10 == 0:
            run.refresh()
            assert run.watch.signs() == watch.signs()
            told.add(verdict(run).tone)
    assert told == {"unsure", "bad"}
    (lost,) = [sign for sign in watch.signs() if sign.trouble]
    assert lost.trouble == "agreement that had been won is lost again"
    assert watch.alarm is not None
    assert f"{lost.trouble} (majority fraction {lost.reference:.3g} → {lost.recent:.3g})" in verdict(run).sentence


@pytest.mark.parametrize("gap", [5000, 10**9])
def test_steps_that_lie_far_apart_are_shown(recorder: HandMade, gap: int):
    for number in (1, 2, 3) if gap == 10**9 else range(1, 500):
        recorder.metrics(min(number * gap, 10**9), METRICS)
    run = RecordedRun.open(recorder.run_dir)
    assert run.step == min(499 * gap, 10**9)
    assert write_report(recorder.run_dir).stat().st_size > 10_000


def test_too_few_steps_for_a_verdict(tmp_path: Path):
    assert verdict(RecordedRun.open(new_run(tmp_path / "a").run_dir)).sentence.startswith("Nothing can be said yet")
    assert verdict(signal_run(tmp_path / "b", {}, steps=12)).sentence.startswith("Too early to say")


def test_a_run_that_ended_itself_says_so_first(recorder: HandMade):
    ended = {"stopped_early": True, "steps": 3, "best_step": 2, "reason": "texts can no longer be read", "before": None}
    recorder.write_text("summary.json", write_json(ended))
    found = verdict(RecordedRun.open(with_metrics(recorder).run_dir))
    assert found.tone == "bad"
    assert found.sentence == (
        "It went wrong: texts can no longer be read. The run ended itself after step 3 and went back to step 2."
    )


# --- curves -----------------------------------------------------------------------------------------------------------


def test_every_metric_has_its_panel_with_first_and_last_value(recorder: HandMade):
    recorder.metrics(1, METRICS)
    recorder.metrics(2, METRICS | {"answers/answer_entropy": 0.2})
    recorder.episode(episode())
    run = RecordedRun.open(recorder.run_dir)
    found = readings(charts(run))
    assert found["steps"] == [1, 2]
    assert all(found["panels"])  # each of them has a curve
    by_title = {panel.title: values for panel, values in zip(PANELS, found["panels"], strict=True)}
    assert by_title["Answer entropy"] == {"solver": [0.8, 0.2]}  # two steps: nothing to smooth over
    assert by_title["Throughput"] == {"both roles": [2.0, 2.0]}  # 3 trajectories in 1.5 s; step 2 played none
    assert set(by_title["KL to the reference"]) == {"solver", "proposer"}
    assert "0.8 → 0.2" in report(recorder).text


def test_smoothing_is_the_mean_of_the_last_twelfth():
    values = np.arange(24.0)
    assert smooth(values).tolist() == [0.0, *(values[1:] - 0.5).tolist()]
    assert smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


def test_a_curve_that_stands_still_is_smoothed_to_itself():
    assert set(smooth(np.full(5000, 0.7)).tolist()) == {0.7}


def test_axes_say_how_small_their_numbers_are(recorder: HandMade):
    """An exponent that stands above the axis would be outside of the panel."""
    for step in range(1, 20):
        recorder.metrics(step, METRICS | {"kl/solver": step * 1e-7, "kl/proposer": 0.0})
    (kl,) = [each for each in charts(RecordedRun.open(recorder.run_dir)) if each.panel.title == "KL to the reference"]
    labels = re.findall(r">([\d.]+e-\d+)</text>", draw_svg(kl))
    assert labels
    assert all(0 < float(label) < 1e-5 for label in labels)


@pytest.mark.parametrize(
    ("low", "high", "share", "expected"),
    [
        (0.03, 0.03, False, (0.02175, 0.03825)),  # β that stands still is a flat line: 1.1 · 0.03 / 2 about it
        (30.0, 30.5, False, (21.8625, 38.6375)),
        (0.0, 2e-6, False, (0.0, 2.2e-6)),
        (0.0, 0.0, False, (0.0, 1.0)),
        (-0.5, 0.5, False, (-0.55, 0.55)),
        (0.98, 1.0, True, (0.49, 1.04)),  # shares end at 1
        (0.0, 1.0, True, (0.0, 1.1)),
        (1e9, 1e9, False, (0.725e9, 1.275e9)),
    ],
)
def test_axes_make_no_drama_of_what_hardly_moves(low: float, high: float, share: bool, expected: tuple[float, float]):
    assert limits(low, high, share=share) == pytest.approx(expected)


def test_a_coefficient_that_stands_still_is_drawn_as_a_flat_line(recorder: HandMade):
    run = RecordedRun.open(with_metrics(recorder, 30).run_dir)
    (beta,) = [each for each in charts(run) if each.panel.title.startswith("KL coefficient")]
    labels = [float(text) for text in re.findall(r">(0\.\d+)</text>", draw_svg(beta))]
    assert min(labels) < 0.0009 < 0.0011 < max(labels)  # about 0.001, where it stands


def test_charts_of_several_runs_have_a_curve_for_each_run(tmp_path: Path):
    runs = {}
    for name, values in {"a": {"kl/solver": 0.5}, "b": {}, "$c": {"reward/solver/brevity": 0.2}}.items():
        recorder = with_metrics(new_run(tmp_path / name), 9 if name == "b" else 3, **values)
        runs[name] = RecordedRun.open(recorder.run_dir, files=("metrics",))
    recorder = HandMade.open(tmp_path / "fresh")
    shutil.copy(tmp_path / "a" / "config.yaml", tmp_path / "fresh")
    runs["fresh"] = RecordedRun.open(recorder.run_dir)
    found = {panel.title: overlay(runs, panel) for panel in panels_together(runs)}
    assert [*found][:4] == [
        "Solver's reward, total", "Majority fraction, solver", "Well-formed, solver", "Distinct questions, in a step",
    ]  # fmt: skip
    assert {*found["KL to the reference, solver"].curves} == {"a", "b", "$c"}
    assert found["KL to the reference, solver"].curves["a"].values.tolist() == [0.5] * 3
    assert {*found["Solver's reward, brevity"].curves} == {"$c"}
    assert {each.span for each in found.values()} == {(1, 9)}
    assert [found["Majority fraction, solver"].curves[name].line for name in ("a", "b", "$c")] == [0, 1, 2]
    assert "Throughput" not in found  # it takes the episodes
    assert readings([*found.values()])["steps"] == [*range(1, 10)]
    for each in found.values():
        draw_svg(each)


def test_thinning_keeps_every_spike():
    values = np.zeros(10_000)
    values[[17, 5_000, 9_999]] = 1.0
    values[[18, 7_777]] = -1.0
    drawn = thin(values)
    assert len(drawn) <= MOST_POINTS
    assert {17, 18, 5_000, 7_777, 9_999} <= set(drawn.tolist())
    assert thin(values[:50]).tolist() == list(range(50))


def test_a_run_that_went_back_shows_where_in_its_curves(recorder: HandMade):
    with_metrics(recorder, 30)
    plain = draw_svg(charts(RecordedRun.open(recorder.run_dir))[2])
    for best, marks in ((20, 1), (10**30, 0), ("x", 0)):
        recorder.write_text("summary.json", write_json({"stopped_early": True, "best_step": best, "steps": 30}))
        assert (draw_svg(charts(RecordedRun.open(recorder.run_dir))[2]) != plain) == bool(marks)
    write_report(recorder.run_dir)  # its PNG has legends only where there are labels: warnings are errors


def test_panels_are_pictures_that_suit_light_and_dark(recorder: HandMade):
    run = RecordedRun.open(with_metrics(recorder, 30).run_dir)
    for each in charts(run):
        svg = draw_svg(each)
        assert "currentColor" in svg
        assert ("stroke: var(--c" in svg) == bool(each.curves)
        assert "prefers-color-scheme:dark" in svg
        assert "<script" not in svg


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_page(recorder: HandMade, steps: int):
    page = Parsed(write_report(with_metrics(recorder, steps).run_dir))
    assert "0 of 0 episodes" in page.text
    assert (recorder.run_dir / "curves.png").exists()


def test_metrics_that_are_missing_or_not_finite_are_left_out(recorder: HandMade):
    recorder.metrics(1, {"reward/solver/total": 0.5, "kl/solver": float("nan")})
    recorder.metrics(2, {"reward/solver/total": float("inf")})
    page = report(recorder)
    assert flat(page.text).count("not measured in this run") == len(PANELS) - 1


# --- What does it ask and answer? -------------------------------------------------------------------------------------


def test_an_episode_shows_question_votes_and_rewards(recorder: HandMade):
    with_metrics(recorder).episode(episode("blue", question="Which one?"))
    page = report(recorder)
    for text in ("Which one?", "I see blue.", "So it is.", "blue ×2", "unreadable ×1", "no closed <think>: blue"):
        assert text in flat(page.text)
    groups = [a["class"] for tag, a in page.elements if tag == "section" and "group" in (a.get("class") or "")]
    assert groups == ["group asked", "group majority first", "group"]


def test_steps_are_coloured_by_their_agreement_and_say_the_number(recorder: HandMade):
    with_metrics(recorder).episode(episode())
    steps = [a for tag, a in report(recorder).elements if tag == "li" and "title" in a]
    assert [a["class"] for a in steps] == ["a5", "none", "a2"]
    assert (steps[0]["title"] or "").startswith("agreement 0.5000; recurs in 0.0 % of other images' groups; counts 0.5")
    assert (steps[1]["title"] or "").startswith("not compared")


def test_every_reward_is_taken_apart(recorder: HandMade):
    with_metrics(recorder).episode(episode())
    text = flat(report(recorder).text)
    assert "0.6264 = 0.5 × 0.7529 outcome + 0.5 × 0.5000 step agreement" in text
    assert "0.7529 = 0.7529 share of the vote, (2/3)^0.7 × 1.0000 length, words before the answer: 8 × 1.0000" in text
    assert "× 1.0000 not said of other images" in text
    assert "step agreement 0.5000" in text
    assert "8 words before the answer" in text
    assert "proposer's reward 0.0367 = exp(−(0.0000 − 0.9)² / (2 · 0.35²)), the vote's entropy against its" in text
    assert "does not add up" not in text


def test_terms_that_do_not_add_up_are_shown_as_such(recorder: HandMade):
    record = episode()
    record["trajectories"][0]["reward"] = 0.9
    record["trajectories"][1]["parts"]["outcome"]["factors"]["length"] = 0.9
    record["trajectories"][2]["parts"]["outcome"] |= {"value": 0.0, "factors": {"a": 1e9, "b": 1e9, "c": 0.0}}
    for t in record["trajectories"]:
        t["advantage"] = None  # it was computed from the true rewards
    with_metrics(recorder).episode(record)
    run = RecordedRun.open(recorder.run_dir)
    read = run.episode(run.entries[0])
    assert read is not None
    wrong = [[line.name for line in reward_terms(t) if not line.adds_up] for t in read.trajectories]
    assert wrong == [["reward"], ["outcome"], []]
    assert flat(report(recorder).text).count("does not add up") == 2


@pytest.mark.parametrize("recipe", [name for name in names("recipes") if name != "oracle"])
def test_the_rewards_of_every_recipe_add_up(tmp_path: Path, recipe: str):
    played_run(tmp_path / "run", recipe)
    text = Page(RecordedRun.open(tmp_path / "run")).render("episodes.html").decode()
    assert text.count('data-name="reward"') == 60  # five trajectories in each of twelve episodes
    assert "does not add up" not in text
    paid = resolve({"images": "/", "model": "tiny", "recipe": recipe}).recipe.reward == "agreement"
    assert ("recorded, not paid" in text) == (not paid)
    # What a reader needs in order to compute the parts from what is seen in the episode.
    assert re.search(r"share of the vote, \([1-5]/5\)\^", text)
    assert re.search(r"mean of its steps, of \d\.\d{4}", text)
    assert "mean of its steps, no step that counts" in text


@pytest.mark.parametrize(
    ("changes", "constants", "shown", "adds_up"),
    [
        ({}, {}, "= exp(−(0.0000 − 0.9)² / (2 · 0.35²))", True),
        ({"answer_entropy": 0.5}, {}, "= exp(−(0.5000 − 0.9)² / (2 · 0.35²))", False),
        ({}, {"target_entropy": 0.0, "entropy_width": 2.0}, "= exp(−(0.0000 − 0)² / (2 · 2²))", False),
        ({}, {"target_entropy": 1e300}, "− 1e+300)²", False),
        ({}, {"entropy_width": 1e-300}, "1e-300²", False),
        ({"trajectories": (), "proposer_reward": 0.0}, {}, "fewer than two answers could be read", True),
        ({"trajectories": ()}, {}, "fewer than two answers could be read", False),
    ],
)
def test_the_proposers_reward_is_computed_again(
    changes: dict[str, Any], constants: dict[str, float], shown: str, adds_up: bool
):
    term = proposer_term(Episode.model_validate(episode(**changes)), Recipe(**constants))
    assert shown in term.made_of
    assert term.adds_up == adds_up


def test_a_reward_of_the_proposer_that_the_function_gave_is_not_computed_again():
    given = Episode.model_validate(episode(proposer_reward=0.3))
    for reward in ("my_rewards.py:fn", "r_zero"):
        term = proposer_term(given, Recipe(reward=reward))
        assert (term.made_of, term.adds_up) == (f"as {reward} gave it", True)
    assert not proposer_term(given, Recipe(reward="discrete")).adds_up


def test_a_group_normalized_advantage_is_computed_again():
    # Mean 0.5 and deviation 0.5: (1 − 0.5) / 0.5.
    mean, advantage = advantage_terms(1.0, 1.0, [0.5, 0.0], normalized=True)
    assert (mean.value, mean.made_of) == (0.5, "= mean reward of the group")
    assert advantage.made_of == "= (1.0000 reward − 0.5000 baseline) / 0.5000 standard deviation of the group"
    assert advantage.adds_up
    assert not advantage_terms(0.9, 1.0, [0.5, 0.0], normalized=True)[1].adds_up
    assert all(term.adds_up for term in advantage_terms(0.0, 0.3, [0.3, 0.3], normalized=True))


def test_a_reward_of_the_users_own_is_added_up_and_drawn_under_its_own_names(recorder: HandMade):
    record = episode()
    parts = {"brevity": {"value": 0.25, "weight": 2.0}, "cites_<b>": {"value": 0.5, "weight": -1.0}}
    parts["outcome"] = {"value": 0.75, "weight": 0.0, "factors": {"share": 0.75}}
    record["trajectories"][0] |= {"parts": parts, "reward": 0.0}
    record["trajectories"][1] |= {"parts": parts, "reward": 0.1}
    record["trajectories"][2] |= {"parts": {"outcome": parts["outcome"]}, "reward": 0.0}
    for t in record["trajectories"]:
        t["advantage"] = None
    recorder.episode(record)
    own = {f"reward/solver/{name}": 0.5 for name in ("total", "brevity", "cites_<b>", "$x", "a fifth")}
    for step in (1, 2, 3):
        recorder.metrics(step, own | {"reward/proposer/total": 0.1})
    page = report(recorder)
    text = flat(page.text)
    assert "reward 0.0000 = 2 × 0.2500 brevity + -1 × 0.5000 cites <b>" in text
    assert "outcome 0.7500 = 0.7500 share recorded, not paid" in text
    assert "reward 0.0000 no part is paid" in text
    assert text.count("does not add up") == 1
    assert [a["data-label"] for tag, a in page.elements if tag == "output" and a.get("data-label")] == [
        "total", "brevity", "cites <b>", "$x", "proposer",
    ]  # fmt: skip
    write_report(recorder.run_dir)  # the legends of its PNG are no mathematics


def test_an_episode_shows_advantages_rationale_and_prompts(recorder: HandMade):
    record = episode("blue", question="Which one?")
    record["question"]["rationale"] = "Because it is hard."
    record["trajectories"][2]["advantage"] = None
    with_metrics(recorder).episode(record)
    page = report(recorder)
    text = flat(page.text)
    # Rewards of 0.6264 and 0.5014 and 0: 0.6264 − (0.5014 + 0) / 2
    assert "baseline 0.2507 = mean reward of the group's others" in text
    assert "advantage +0.3757 = 0.6264 reward − 0.2507 baseline" in text
    assert text.count("not used in an update · 1 tokens") == 1
    # The proposer's: exp(−0.9² / (2 · 0.35²)) + 0.0625
    assert "baseline 0.0992 = moving average of earlier rewards" in text
    assert "advantage -0.0625 = 0.0367 reward − 0.0992 baseline" in text
    assert "The proposer's rationale: Because it is hard." in text
    assert "Proposer:Ask something." in text
    assert "Solver:Answer: Which one?" in text
    assert [a for tag, a in page.elements if tag == "details" and a.get("class") == "prompts"] == [{"class": "prompts"}]
    assert [entry.step for entry in select(RecordedRun.open(recorder.run_dir), text="it is hard")] == [1]


def test_an_advantage_that_is_not_reward_minus_baseline_is_shown_as_such(recorder: HandMade):
    record = episode()
    record["trajectories"][1]["advantage"] += 0.01
    with_metrics(recorder).episode(record)
    assert flat(report(recorder).text).count("does not add up") == 1


def test_an_episode_alone_shows_every_text_whole_and_its_neighbours(recorder: HandMade):
    long = "word " * 5000
    for step in (1, 2, 2, 3):
        record = episode(f"text {step}", step=step)
        record["trajectories"][0]["text"] = f"<think>{long}</think>"
        recorder.episode(record)
    run = RecordedRun.open(recorder.run_dir)
    assert [entry.name for entry in run.entries] == ["1-1", "2-1", "2-2", "3-1"]
    page = Page(run)
    text = page.render("alone.html", Query.read({"episode": "2-1"})).decode()
    assert f"&lt;think&gt;{long}&lt;/think&gt;" in text
    assert long not in page.render("episodes.html").decode()
    assert "3 of 4, newest" in text
    assert re.findall(r'rel="(\w+)" href="\?[^"]*episode=([\d-]+)"', text) == [("prev", "2-2"), ("next", "1-1")]
    only = page.render("alone.html", Query("newest", "text 2", episode=(2, 2))).decode()
    assert "1 of 2, newest with" in only
    elsewhere = page.render("alone.html", Query("newest", "no such text", episode=(2, 2))).decode()
    assert "2 of 4, newest" in elsewhere  # a link that was kept while its list changed
    for missing in ((9, 9), (2, 3), (0, 0)):
        with pytest.raises(NoSuchEpisodeError):
            page.render("alone.html", Query(episode=missing))


def test_an_unreadable_question_shows_why_and_what_was_written(recorder: HandMade):
    with_metrics(recorder).episode(unreadable(text="Ask me <question>"))
    text = report(recorder).text
    assert "no closed <question>" in text
    assert "Ask me <question>" in text


def test_episodes_whose_steps_were_not_compared_show_their_parts(recorder: HandMade):
    record = episode()
    for t in record["trajectories"]:
        t["step_scores"] = []
    with_metrics(recorder).episode(record)
    page = report(recorder)
    assert "outcome 0.7529" in flat(page.text)
    assert "This run compared no reasoning steps" in flat(page.text)


def test_a_run_of_an_older_version_is_refused_in_a_sentence(recorder: HandMade):
    recorder.write_text("config.yaml", "images: /pictures\nmodel: tiny\nsteps: 3\n")
    with pytest.raises(UsageError, match=r"this run cannot be shown: .* was written by ireasoner 0\.1"):
        RecordedRun.open(recorder.run_dir)


def filled(recorder: HandMade) -> RecordedRun:
    """Five episodes, told apart by their step."""
    changes: list[dict[str, Any]] = [{}, {"answer_entropy": 1.5}, {}, {"answer_entropy": 0.5}]
    for step, change in enumerate(changes, 1):
        recorder.episode(episode(f"text {step}", step=step, **change))
    record = episode("text 5", step=5)
    for t in record["trajectories"]:
        t.update(reward=0.9, problem=None)
    recorder.episode(record)
    recorder.episode(unreadable(step=6))
    return RecordedRun.open(recorder.run_dir)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("newest", [6, 5, 4, 3, 2, 1]),
        ("disagreement", [2, 4, 5, 3, 1]),
        ("highest", [5, 4, 3, 2, 1]),
        ("lowest", [4, 3, 2, 1, 5]),
        ("malformed", [6, 4, 3, 2, 1]),
        ("wrong", []),
    ],
)
def test_filters(recorder: HandMade, name: str, steps: list[int]):
    assert [entry.step for entry in select(filled(recorder), name)] == steps


def test_text_search_and_a_stretch_of_steps(recorder: HandMade):
    run = filled(recorder)
    assert [entry.step for entry in select(run, text=" TEXT 3 ")] == [3]  # in answers and steps, whatever the case
    assert [entry.step for entry in select(run, text="how many")] == [5, 4, 3, 2, 1]
    assert select(run, text="nowhere") == []
    assert [entry.step for entry in select(run, "disagreement", steps=(3, 5))] == [4, 5, 3]


def test_wrong_majorities_are_found_where_the_truth_is_known(tmp_path: Path):
    recorder = new_run(tmp_path / "run", images=str(tmp_path / "run" / "data" / "unlabeled"))
    images = tmp_path / "run" / "data" / "unlabeled"
    dataset.write_unlabeled(images, 3)
    truth = dataset.load_truth(images)
    for step, (name, picture) in enumerate(truth.items(), 1):
        question = world.questions(picture)[0]
        key = {1: "text:nonsense"}.get(step)
        record = episode("x", step=step, question=question.text, image=name)
        recorder.episode(record | {"majority_answer": key or answer_key(question.answer, question.text)})
    assert [entry.wrong for entry in RecordedRun.open(recorder.run_dir).entries] == [None, None, None]
    run = RecordedRun.open(recorder.run_dir, lambda config: truth_beside(config.images, recorder.run_dir))
    assert [entry.wrong for entry in run.entries] == [True, False, False]
    assert [entry.step for entry in select(run, "wrong")] == [1]
    page = write_report(recorder.run_dir, tmp_path / "page.html", lambda config: truth_beside(config.images))
    assert "true answer" in Parsed(page).text


def test_answers_are_marked_where_the_truth_is_known(recorder: HandMade):
    record = episode("seven", true_answer="7")
    for t, answer in zip(record["trajectories"], ("7", "8", None), strict=True):
        t.update(answer=answer, answer_key=answer and answer_key(answer, "How many?"), in_majority=answer == "8")
    recorder.episode(record)
    recorder.episode(record | {"true_answer": None})
    text = flat(report(with_metrics(recorder)).text)
    assert "8 ×1✗7 ×1✓unreadable ×1 step 1" in text  # the majority first, the unreadable last
    assert "true answer 7" in text
    assert "8 ×17 ×1unreadable ×1 step 1" in text
    marks = ("majority ✗ false", "✓ true", "majority", "✗ false")
    assert [text.count(f"×1 {mark}") for mark in marks] == [1, 1, 2, 0]


def test_a_copied_run_keeps_the_truth_about_its_pictures(tmp_path: Path):
    images = tmp_path / "run" / "data" / "unlabeled"
    new_run(tmp_path / "run", images=str(images))
    dataset.write_unlabeled(images, 2)
    (image, picture), *_ = dataset.load_truth(images).items()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    copy = RecordedRun.open(tmp_path / "copy", lambda config: truth_beside(config.images, tmp_path / "copy"))
    question = world.questions(picture)[0]
    assert copy.true_answer(image, question.text) == question.answer


def test_truth_outside_the_run_is_read_only_where_it_was_named(tmp_path: Path):
    images = tmp_path / "elsewhere" / "unlabeled"
    dataset.write_unlabeled(images, 2)
    recorder = new_run(tmp_path / "run", images=str(images))
    beside = RecordedRun.open(recorder.run_dir, lambda config: truth_beside(config.images, recorder.run_dir))
    named = RecordedRun.open(recorder.run_dir, lambda config: read_truth(dataset.truth_path(images)))
    (image, picture), *_ = dataset.load_truth(images).items()
    question = world.questions(picture)[0]
    assert beside.true_answer(image, question.text) is None
    assert named.true_answer(image, question.text) == question.answer
    assert [run.step_truth(image, question.steps[0]) for run in (beside, named)] == [None, True]


def test_a_report_keeps_the_first_episodes_of_every_list(recorder: HandMade):
    for step in range(1, IN_REPORT + 11):
        recorder.episode(episode(f"text {step}", step=step, answer_entropy=1 / step))
    page = report(with_metrics(recorder))
    articles = [a for tag, a in page.elements if tag == "article"]
    newest = [a["data-newest"] for a in articles if "data-newest" in a]
    assert newest == [str(rank) for rank in range(IN_REPORT)]
    disagreement = [a["data-disagreement"] for a in articles if "data-disagreement" in a]
    assert disagreement == [str(rank) for rank in reversed(range(IN_REPORT))]  # the oldest disagree most
    assert f"{len(articles)} of {IN_REPORT + 10} episodes" in page.text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Query()),
        ({"show": "wrong", "q": "red", "page": "2", "from": "3", "to": "9"}, Query("wrong", "red", (3, 9), 2)),
        ({"show": "../etc", "page": "-1", "from": "x", "to": "²"}, Query()),
        ({"page": "9" * 50, "from": "7"}, Query(steps=(7, 10**9))),
        ({"episode": "12-3"}, Query(episode=(12, 3))),
        ({"episode": "12-3-4"}, Query(episode=(12, 3))),
        ({"episode": "12"}, Query()),
        ({"episode": "../-x"}, Query()),
    ],
)
def test_an_address_may_say_anything(values: dict[str, str], expected: Query):
    assert Query.read(values) == expected


def test_pages_of_episodes(recorder: HandMade):
    for step in range(1, 31):
        recorder.episode(episode(step=step))
    page = Page(RecordedRun.open(recorder.run_dir))
    texts = [page.render("episodes.html", Query(page=number)).decode() for number in range(4)]
    assert [flat(re.sub("<[^>]*>", " ", text)).split(" episodes")[0] for text in texts] == [
        "1–12 of 30", "13–24 of 30", "25–30 of 30", "25–30 of 30",
    ]  # fmt: skip
    assert 'rel="prev"' not in texts[0]
    assert 'rel="next"' not in texts[2]


# --- How do the steps agree? ------------------------------------------------------------------------------------------


def test_averaged_agreement_ranks_within_each_group(recorder: HandMade):
    first, second = episode(), episode()
    second["trajectories"].reverse()  # the order of sampling means nothing
    for record in (first, second):
        recorder.episode(record)
    run = RecordedRun.open(recorder.run_dir)
    assert average_agreement(run.entries) == [[0.5], [0.25]]
    assert average_agreement([]) == []


def test_stretches_of_training(recorder: HandMade):
    assert stretches(RecordedRun.open(recorder.run_dir)) == []
    for step in range(1, 11):
        recorder.episode(episode(step=step))
    assert stretches(RecordedRun.open(recorder.run_dir)) == [(1, 3), (4, 7), (8, 10)]


# --- How did it change? What ran? -------------------------------------------------------------------------------------


def test_probes_stand_side_by_side_through_training(recorder: HandMade):
    for step in (0, 2, 4):
        for image in ("a.png", "b.png"):
            answer = {0: None, 2: "7", 4: "seven"}[step]
            steps = [f"Of {image} at {step}."]
            recorder.probe(probe(step, image, answer, question=f"What of {image}?", reasoning_steps=steps))
    page = report(with_metrics(recorder))
    text = flat(page.text)
    assert text.index("before training") < text.index("What of a.png?") < text.index("Of a.png at 4.")
    assert text.index("Of a.png at 4.") < text.index("What of b.png?")
    assert text.count("unreadable") == 2
    assert [a.get("class") for tag, a in page.elements if tag == "td"].count("changed") == 2  # 7 and seven are the same


def test_the_energy_of_a_trajectory_is_shown_where_it_was_measured(recorder: HandMade):
    assert "Energy" not in report(with_metrics(recorder)).text
    recorder.write_text("summary.json", write_json({"energy": None}))
    assert "Energy" not in report(recorder).text
    took = {"joules": 6000.0, "steps": 5, "of": ["gpu"], "joules_per_trajectory": 120.0, "joules_per_point": None}
    recorder.write_text("summary.json", write_json({"energy": took}))
    assert "Energy (GPU): 6 kJ in 5 steps, 120 J a trajectory." in flat(report(recorder).text)


def test_many_probes_are_shown_at_some_steps(recorder: HandMade):
    for step in range(0, 2001, 50):
        recorder.probe(probe(step))
    text = flat(report(with_metrics(recorder)).text)
    for column in ("before training", "step 400", "step 800", "step 1200", "step 1600", "step 2000"):
        assert column in text
    assert "step 50 " not in text


def test_what_ran_names_options_differences_skips_and_events(recorder: HandMade):
    recorder.skip(1, "sub/broken.jpg", "the file is empty")
    recorder.event(2, "Something to know.")
    (recorder.run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    text = flat(report(with_metrics(recorder)).text)
    for shown in ("sub/broken.jpg: the file is empty", "step 2: Something to know.", "step-000002"):
        assert shown in text
    for name in ("learning_rate", "outcome_exponent", "solver_prompt"):
        assert name in text
    assert "steps 3 40" in text  # here, and what the preset says


# --- pictures ---------------------------------------------------------------------------------------------------------


def pixels(attributes: dict[str, str | None]) -> np.ndarray:
    kind, _, data = (attributes["src"] or "").partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_thumbnails_are_inside_the_page(recorder: HandMade):
    red = Image.new("RGB", (84, 84), "red")
    thumbnail = recorder.thumbnail(red, "0" * 16)
    with_metrics(recorder).episode({**episode(), "thumbnail": thumbnail})
    recorder.probe(probe(0, thumbnail=thumbnail))
    found = report(recorder).thumbnails()
    assert len(found) == 2
    assert all(np.abs(pixels(image) - np.asarray(red)).max() < 8 for image in found)


def test_a_report_holds_small_pictures(recorder: HandMade):
    thumbnail = recorder.thumbnail(Image.new("RGB", (2000, 1000), "blue"), "1" * 16)
    assert thumbnail.endswith(".webp")
    with_metrics(recorder).episode(episode(thumbnail=thumbnail))
    (found,) = report(recorder).thumbnails()
    assert pixels(found).shape == (128, 256, 3)


def test_nothing_outside_the_runs_own_images_is_read(recorder: HandMade, tmp_path: Path):
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8), "blue").save(recorder.run_dir / "deadbeef.png")
    (recorder.run_dir / "images" / "00000000.png").symlink_to(tmp_path / "secret.png")
    (recorder.run_dir / "images" / "11111111.png").write_bytes(b"no picture")
    (recorder.run_dir / "images" / "33333333.webp").symlink_to(tmp_path / "secret.png")
    (recorder.run_dir / "images" / "22222222.png").mkdir()
    places = [
        "../secret.png", str(tmp_path / "secret.png"), "images/../../secret.png", "images/00000000.png",
        "images/33333333.webp", "images/../deadbeef.png", "images/11111111.png", "images/22222222.png", "config.yaml",
        "", "images",
    ]  # fmt: skip
    for place in places:
        with_metrics(recorder).episode(episode(thumbnail=place))
    page = report(recorder)
    assert f"{len(places)} of {len(places)} episodes" in page.text
    assert page.thumbnails() == []


def test_a_picture_that_unpacks_to_something_huge_is_left_out(recorder: HandMade):
    Image.new("1", (20_000, 20_000)).save(recorder.run_dir / "images" / "33333333.png")
    with_metrics(recorder).episode(episode(thumbnail="images/33333333.png"))
    assert report(recorder).thumbnails() == []


# --- runs that are not whole ------------------------------------------------------------------------------------------


def test_the_page_can_be_written_again(recorder: HandMade):
    with_metrics(recorder, 1).episode(episode(question="The first."))
    first = write_report(recorder.run_dir)
    recorder.episode(episode(question="The second.", step=2))
    assert write_report(recorder.run_dir) == first == recorder.run_dir / "report.html"
    assert "The second." in Parsed(first).text


def test_a_report_can_go_elsewhere_and_leaves_the_run_alone(recorder: HandMade, tmp_path: Path):
    with_metrics(recorder)
    before = sorted(recorder.run_dir.rglob("*"))
    assert write_report(recorder.run_dir, tmp_path / "mail.html") == tmp_path / "mail.html"
    assert sorted(recorder.run_dir.rglob("*")) == before


def test_summary_of_somebody_else(recorder: HandMade):
    with_metrics(recorder)
    for summary in (
        "[]",
        "{}",
        '{"difference": {"greedy": 3}}',
        '{"trained_roles": 7}',
        '{"versions": 7, "difference": []}',
        '{"energy": 7}',
        '{"energy": {"of": ["gpu"], "joules": "much", "steps": 1}}',
        "{",
        "null",
    ):
        recorder.write_text("summary.json", summary)
        assert b"Is it working?" in Page(RecordedRun.open(recorder.run_dir)).render("page.html")
