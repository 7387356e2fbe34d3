"""A small visual world whose truth is known: charts of three kinds, scenes of shapes and signs, drawn procedurally.

A `Picture` is the truth; `draw` turns it into an image under a `Style`; `questions` lists what can be asked;
`solve` answers a question written in English, with true reasoning steps; `step_truth` says whether a written
reasoning step is true of a picture. Every random choice comes from the `numpy.random.Generator` handed in.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ireasoner.playground import wording

Family = Literal["bars", "dots", "pie", "scene", "sign"]
FAMILIES: tuple[Family, ...] = ("bars", "dots", "pie", "scene", "sign")
IMAGE_SIZE = 84  # pixels: 6 x 6 patches of 14, 9 image tokens after the 2 x 2 merge
PIE_PARTS = 8
HUES = {"red": 0.0, "orange": 0.085, "yellow": 0.155, "green": 0.36, "blue": 0.61, "purple": 0.79}
COLORS = tuple(HUES)
SHAPES = ("circle", "square", "triangle", "cross")
# Signs are single shapes and know more: colours as hue, and shares of the style's saturation and brightness.
SIGN_COLORS = {
    **{name: (hue, 1.0, 1.0) for name, hue in HUES.items()},
    "teal": (0.5, 1.0, 0.6), "brown": (0.02, 0.85, 0.65), "gray": (0.0, 0.0, 0.6), "black": (0.0, 0.0, 0.0),
}  # fmt: skip
SIGN_SHAPES = (*SHAPES, "rectangle")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)

# How each chart is spoken of: noun, verb, words for the most and the least.
CHART_WORDS = {
    "bars": ("bar", "reaches", "tallest", "shortest"),
    "dots": ("row", "has", "longest", "shortest"),
    "pie": ("slice", "takes", "biggest", "smallest"),
}
# How signs are asked about; {x} is a shape or "<color> shape". Any may be written in small letters throughout.
SIGN_QUESTIONS = {
    "exists": (
        "Is there a {x} here?", "Is a {x} present in the image?", "Does the image contain any {x}?",
        "Can you see a {x}?", "Does the picture show a {x}?",
    ),
    "absent": (
        "Is there no {x}?", "Is there not any {x}?", "Is no {x} present in the image?",
        "Does the image not contain any {x}?", "Does the picture not show a {x}?",
    ),
    "sign color": (
        "Which color is the {x}?", "What color does the {x} have?", "What is the color of the {x} here?",
        "Name the color of the {x}.",
    ),
    "sign shape": (
        "Which shape is in the image?", "What shape do you see?", "Which shape is present?",
        "What kind of shape is there?", "Which shape does the image contain?",
    ),
}  # fmt: skip
_SIGN_PATTERNS = tuple(
    (kind, re.compile(re.escape(form).replace(r"\{x\}", r"(\w+ shape|\w+)"), re.IGNORECASE))
    for kind, forms in SIGN_QUESTIONS.items()
    for form in forms
)


@dataclass(frozen=True)
class Picture:
    """What is true of one image.

    Charts hold (color, value) pairs in reading order; a `scene` holds (color, shape, cell) triples, a `sign` one whose
    cell is empty.
    """

    family: Family
    values: tuple[tuple[str, int], ...] = ()
    objects: tuple[tuple[str, str, str], ...] = ()

    def value(self, color: str) -> int | None:
        return dict(self.values).get(color)

    def cell(self, color: str, shape: str) -> str | None:
        return next((place for c, s, place in self.objects if (c, s) == (color, shape)), None)


@dataclass(frozen=True)
class Question:
    """A question that the world can ask, with one true line of reasoning and the true answer."""

    text: str
    steps: tuple[str, ...]
    answer: str
    kind: str


@dataclass(frozen=True)
class Style:
    """How a picture is drawn. Colours are fractions of full scale, lengths are pixels of the 84-pixel canvas."""

    background: tuple[float, float, float]
    saturation: float
    brightness: float
    hue_jitter: float  # fraction of the colour circle, at most, for each item by itself
    outline: float  # width; 0: none
    filled: float  # 1: solid; 0: outline alone; between: opacity of the filling
    noise: float  # standard deviation, in grey levels of 255
    blur: float
    jitter: float  # largest displacement of an item
    grid: bool
    thickness: float  # share of its slot that an item fills


def sample_style(name: str, rng: np.random.Generator) -> Style:
    """One style of the named family of styles.

    `varied`: solid colours on light or dark paper, what the tiny LMM was pre-trained on. `chalk`: pale hollow outlines
    on a dark and grainy board, what the demo's unlabeled folder is drawn in. `plain`: `varied` without its variety.

    Raises:
        ValueError: no such style.
    """
    u = rng.uniform
    if name == "plain":
        return Style((1.0, 1.0, 1.0), 0.9, 0.85, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, False, 0.7)
    if name == "varied":
        dark = rng.random() < 0.3
        paper = u(0.05, 0.35) if dark else u(0.8, 1.0)
        background = tuple(float(np.clip(paper + u(-0.06, 0.06), 0, 1)) for _ in range(3))
        return Style(
            background=(background[0], background[1], background[2]),
            saturation=u(0.6, 1.0),
            brightness=u(0.8, 1.0) if dark else u(0.6, 1.0),
            hue_jitter=0.012,
            outline=float(rng.choice([0.0, 1.0, 2.0])),
            filled=float(rng.choice([1.0, 1.0, 1.0, 0.6])),
            noise=u(0.0, 12.0),
            blur=u(0.0, 0.6),
            jitter=u(0.0, 2.0),
            grid=bool(rng.random() < 0.4),
            thickness=u(0.5, 0.85),
        )
    if name == "chalk":
        board = u(0.05, 0.3)
        background = tuple(float(np.clip(board + u(-0.04, 0.04), 0, 1)) for _ in range(3))
        return Style(
            background=(background[0], background[1], background[2]),
            saturation=u(0.45, 0.8),
            brightness=u(0.85, 1.0),
            hue_jitter=0.012,
            outline=u(1.5, 3.0),
            filled=u(0.15, 0.8),
            noise=u(6.0, 18.0),
            blur=u(0.3, 0.8),
            jitter=u(0.0, 2.5),
            grid=bool(rng.random() < 0.4),
            thickness=u(0.45, 0.85),
        )
    raise ValueError(f"no style {name!r}: choose plain, varied or chalk")


def sample_picture(rng: np.random.Generator, family: Family | None = None, items: tuple[int, int] = (2, 4)) -> Picture:
    """A random picture; `items` bounds how many bars, rows, slices or objects it holds (the difficulty)."""
    family = family or FAMILIES[rng.integers(len(FAMILIES))]
    if family == "sign":
        color, shape = tuple(SIGN_COLORS)[rng.integers(len(SIGN_COLORS))], SIGN_SHAPES[rng.integers(len(SIGN_SHAPES))]
        return Picture("sign", objects=((color, shape, ""),))
    count = int(rng.integers(items[0], items[1] + 1))
    if family == "scene":
        pairs = rng.choice(len(COLORS) * len(SHAPES), count, replace=False)
        cells = rng.choice(len(CELLS), count, replace=False)
        objects = [
            (COLORS[p // len(SHAPES)], SHAPES[p % len(SHAPES)], CELLS[c]) for p, c in zip(pairs, cells, strict=True)
        ]
        return Picture("scene", objects=tuple(sorted(objects, key=lambda o: CELLS.index(o[2]))))
    colors = [COLORS[i] for i in rng.choice(len(COLORS), count, replace=False)]
    if family == "pie":
        cuts = np.sort(rng.choice(np.arange(1, PIE_PARTS), count - 1, replace=False))
        values = np.diff(np.concatenate([[0], cuts, [PIE_PARTS]]))
    else:
        values = rng.integers(1, 10 if family == "bars" else 7, count)
    return Picture(family, values=tuple((c, int(v)) for c, v in zip(colors, values, strict=True)))


# --- drawing ---------------------------------------------------------------------------------------------------------

_SCALE = 3  # drawn three times too large, then reduced: smooth edges


def draw(picture: Picture, style: Style, rng: np.random.Generator) -> Image.Image:
    """The picture as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    size = IMAGE_SIZE * _SCALE
    background = tuple(round(255 * c) for c in style.background)
    canvas = Image.new("RGB", (size, size), background)
    pen = ImageDraw.Draw(canvas)
    ink = 0.25 if np.mean(style.background) > 0.5 else 0.85
    faint = tuple(round(255 * (0.75 * c + 0.25 * ink)) for c in style.background)

    def paint(color: str) -> dict[str, object]:
        hue, saturation, brightness = SIGN_COLORS[color]
        hue = (hue + rng.uniform(-1, 1) * style.hue_jitter) % 1.0
        rgb = np.array(colorsys.hsv_to_rgb(hue, style.saturation * saturation, style.brightness * brightness))
        fill = style.filled * rgb + (1 - style.filled) * np.array(style.background)
        edge = rgb * 0.75 if style.filled == 1.0 else rgb
        if color == "black" and ink > 0.5:  # on a dark board it would not be seen
            fill, edge = np.zeros(3), np.full(3, 0.6)
        width = round(style.outline * _SCALE)
        return {
            "fill": tuple(int(255 * c) for c in fill),
            "outline": tuple(int(255 * c) for c in edge) if width else None,
            "width": max(width, 1),
        }

    def shake() -> float:
        return float(rng.uniform(-1, 1) * style.jitter)

    def scaled(*points: float) -> list[float]:
        return [p * _SCALE for p in points]

    if picture.family in ("bars", "dots") and style.grid:
        for level in range(6, 79, 24):
            ends = (6, level, 78, level) if picture.family == "bars" else (level, 6, level, 78)
            pen.line(scaled(*ends), fill=faint, width=_SCALE)
    slot = 72 / max(len(picture.values), 1)
    if picture.family == "bars":
        for i, (color, value) in enumerate(picture.values):
            middle = 6 + (i + 0.5) * slot + shake()
            half = min(slot, 28) * style.thickness / 2
            pen.rectangle(scaled(middle - half, 78 - 8 * value, middle + half, 78), **paint(color))  # type: ignore[arg-type]
        pen.line(scaled(4, 78, 80, 78), fill=tuple(round(255 * ink) for _ in range(3)), width=_SCALE)
    elif picture.family == "dots":
        for i, (color, value) in enumerate(picture.values):
            y, x0 = 6 + (i + 0.5) * slot + shake(), 12 + shake()
            radius = 5.5 * style.thickness + 0.5
            look = paint(color)
            for k in range(value):
                x = x0 + 12 * k
                pen.ellipse(scaled(x - radius, y - radius, x + radius, y + radius), **look)  # type: ignore[arg-type]
    elif picture.family == "pie":
        angle, cx, cy = -90.0, 42 + shake(), 42 + shake()
        radius = 24 + 14 * style.thickness
        for color, value in picture.values:
            sweep = 360 * value / PIE_PARTS
            box = scaled(cx - radius, cy - radius, cx + radius, cy + radius)
            pen.pieslice(box, angle, angle + sweep, **paint(color))  # type: ignore[arg-type]
            angle += sweep
    elif picture.family == "sign":
        ((color, shape, _),) = picture.objects
        r = rng.uniform(6, 20)
        x, y = rng.uniform(r + 2, IMAGE_SIZE - r - 2, 2)
        _draw_shape(pen, shape, x * _SCALE, y * _SCALE, r * _SCALE, paint(color), float(rng.uniform(0.4, 0.75)))
    else:
        for color, shape, cell in picture.objects:
            row, column = divmod(CELLS.index(cell), 3)
            x, y, r = 14 + 28 * column + shake(), 14 + 28 * row + shake(), 5 + 8 * style.thickness
            _draw_shape(pen, shape, x * _SCALE, y * _SCALE, r * _SCALE, paint(color))
    image = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    if style.blur > 0.05:
        image = image.filter(ImageFilter.GaussianBlur(style.blur))
    if style.noise:
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels + rng.normal(0.0, style.noise, (IMAGE_SIZE, IMAGE_SIZE, 1)).astype(np.float32)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, look: dict[str, object], ratio: float = 0.6
) -> None:
    """`ratio` is a rectangle's short side over its long one, lying or standing."""
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], **look)  # type: ignore[arg-type]
    elif shape == "square":
        pen.rectangle([x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r], **look)  # type: ignore[arg-type]
    elif shape == "rectangle":
        lying = round(ratio * 1000) % 2
        w, h = (0.95 * r, ratio * 0.95 * r) if lying else (ratio * 0.95 * r, 0.95 * r)
        pen.rectangle([x - w, y - h, x + w, y + h], **look)  # type: ignore[arg-type]
    elif shape == "triangle":
        corners = [
            (x + r * math.cos(a), y + 0.15 * r + r * math.sin(a)) for a in (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)
        ]
        pen.polygon(corners, **look)  # type: ignore[arg-type]
    else:
        t = 0.33 * r
        corners = [
            (-t, -r),
            (t, -r),
            (t, -t),
            (r, -t),
            (r, t),
            (t, t),
            (t, r),
            (-t, r),
            (-t, t),
            (-r, t),
            (-r, -t),
            (-t, -t),
        ]
        pen.polygon([(x + dx, y + dy) for dx, dy in corners], **look)  # type: ignore[arg-type]


# --- what is true, in English ----------------------------------------------------------------------------------------


def facts(picture: Picture) -> tuple[str, ...]:
    """Every item of the picture as a sentence, in reading order."""
    if picture.family == "sign":
        return tuple(f"The shape is a {c} {s}." for c, s, _ in picture.objects)
    if picture.family == "scene":
        return tuple(f"The {c} {s} is at the {place}." for c, s, place in picture.objects)
    noun, verb, _, _ = CHART_WORDS[picture.family]
    return tuple(f"The {c} {noun} {verb} {v}." for c, v in picture.values)


def _listing(words: Sequence[str]) -> str:
    return ", ".join(words)


def solve(picture: Picture, question: str) -> Question | None:
    """The truth about a question in the world's own wording; None where it has none, or the wording is another.

    The one place where answers come from: `questions` asks it, and so do the oracle and the evaluation of questions
    that a proposer wrote.
    """
    text = " ".join(question.split())
    if picture.family == "scene":
        return _solve_scene(picture, text)
    if picture.family == "sign":
        return _solve_sign(picture, text)
    noun, _, most, least = CHART_WORDS[picture.family]
    lines, values = dict(zip(dict(picture.values), facts(picture), strict=True)), dict(picture.values)
    if m := re.fullmatch(rf"What is the value of the (\w+) {noun}\?", text):
        if m[1] in values:
            return Question(text, (lines[m[1]],), str(values[m[1]]), "value")
    elif m := re.fullmatch(rf"Which {noun} is the ({most}|{least})\?", text):
        best = (max if m[1] == most else min)(values.values())
        winners = [c for c, v in values.items() if v == best]
        if len(winners) == 1:
            return Question(text, (*lines.values(), f"The {m[1]} is {winners[0]}."), winners[0], "extreme")
    elif m := re.fullmatch(r"How much more is (\w+) than (\w+)\?", text):
        if m[1] in values and m[2] in values and values[m[1]] > values[m[2]]:
            a, b = values[m[1]], values[m[2]]
            return Question(text, (lines[m[1]], lines[m[2]], f"{a} - {b} = {a - b}."), str(a - b), "difference")
    elif m := re.fullmatch(r"What do (\w+) and (\w+) add up to\?", text):
        if m[1] in values and m[2] in values and m[1] != m[2]:
            a, b = values[m[1]], values[m[2]]
            return Question(text, (lines[m[1]], lines[m[2]], f"{a} + {b} = {a + b}."), str(a + b), "sum")
    elif m := re.fullmatch(r"Is (\w+) more than (\w+)\?", text):
        if m[1] in values and m[2] in values and m[1] != m[2]:
            a, b = values[m[1]], values[m[2]]
            verdict = f"{a} is more than {b}." if a > b else f"{a} is not more than {b}."
            return Question(text, (lines[m[1]], lines[m[2]], verdict), "yes" if a > b else "no", "compare")
    elif re.fullmatch(rf"How many {noun}s are there\?", text):
        return Question(text, (f"The {noun}s are {_listing(list(values))}.",), str(len(values)), "count")
    return None


def _solve_scene(picture: Picture, text: str) -> Question | None:
    lines = facts(picture)
    if m := re.fullmatch(r"Where is the (\w+) (\w+)\?", text):
        for line, (color, shape, cell) in zip(lines, picture.objects, strict=True):
            if (color, shape) == (m[1], m[2]):
                return Question(text, (line,), cell, "where")
    elif m := re.fullmatch(r"What is at the (\w+ \w+)\?", text):
        for line, (color, shape, cell) in zip(lines, picture.objects, strict=True):
            if cell == m[1]:
                return Question(text, (line,), f"{color} {shape}", "what")
    elif m := re.fullmatch(r"What color is the (\w+)\?", text):
        found = [(line, o) for line, o in zip(lines, picture.objects, strict=True) if o[1] == m[1]]
        if len(found) == 1:
            return Question(text, (found[0][0],), found[0][1][0], "color")
    elif m := re.fullmatch(r"Is the (\w+) (\w+) (above|left of) the (\w+) (\w+)\?", text):
        a, b = picture.cell(m[1], m[2]), picture.cell(m[4], m[5])
        if a and b and a != b:
            scale, part = (ROWS, 0) if m[3] == "above" else (COLUMNS, 1)
            pa, pb = a.split()[part], b.split()[part]
            true = scale.index(pa) < scale.index(pb)
            verdict = f"{pa} is {'' if true else 'not '}{m[3]} {pb}."
            steps = (f"The {m[1]} {m[2]} is at the {a}.", f"The {m[4]} {m[5]} is at the {b}.", verdict)
            return Question(text, steps, "yes" if true else "no", "relation")
    elif text == "How many objects are there?":
        names = _listing([f"{c} {s}" for c, s, _ in picture.objects])
        return Question(text, (f"The objects are {names}.",), str(len(picture.objects)), "count")
    return None


def _solve_sign(picture: Picture, text: str) -> Question | None:
    ((color, shape, _),), lines = picture.objects, facts(picture)
    kind, m = next(((kind, m) for kind, p in _SIGN_PATTERNS if (m := p.fullmatch(text))), ("", None))
    if m is None:
        return None
    if kind == "sign shape":
        return Question(text, lines, shape, kind)
    asked = m[1].lower()
    true = asked in ("shape", shape, f"{color} shape")
    if kind == "sign color":
        return Question(text, lines, color, kind) if true else None
    if asked not in SIGN_SHAPES and asked.removesuffix(" shape") not in SIGN_COLORS:
        return None
    verdict = f"It is {'' if true else 'not '}a {asked}."
    return Question(text, (*lines, verdict), "yes" if true == (kind == "exists") else "no", kind)


def questions(picture: Picture) -> tuple[Question, ...]:
    """Every question that has a true answer, in a fixed order."""
    if picture.family == "scene":
        names = [f"{c} {s}" for c, s, _ in picture.objects]
        texts = [f"Where is the {n}?" for n in names]
        texts += [f"What is at the {cell}?" for *_, cell in picture.objects]
        texts += [f"What color is the {shape}?" for shape in SHAPES]
        texts += [f"Is the {a} {how} the {b}?" for a in names for b in names for how in ("above", "left of") if a != b]
        texts += ["How many objects are there?"]
    elif picture.family == "sign":
        things = [*SIGN_SHAPES, *(f"{c} shape" for c in SIGN_COLORS)]
        subjects = {"sign color": ["shape", picture.objects[0][1]], "sign shape": [""]}
        texts = [f.format(x=x) for k, forms in SIGN_QUESTIONS.items() for f in forms for x in subjects.get(k, things)]
    else:
        noun, _, most, least = CHART_WORDS[picture.family]
        colors = [c for c, _ in picture.values]
        pairs = [(a, b) for a in colors for b in colors if a != b]
        texts = [f"What is the value of the {c} {noun}?" for c in colors]
        texts += [f"Which {noun} is the {word}?" for word in (most, least)]
        texts += [f"How much more is {a} than {b}?" for a, b in pairs]
        texts += [f"What do {a} and {b} add up to?" for a, b in pairs]
        texts += [f"Is {a} more than {b}?" for a, b in pairs]
        texts += [f"How many {noun}s are there?"]
    return tuple(found for text in texts if (found := solve(picture, text)) is not None)


def sample_question(picture: Picture, rng: np.random.Generator) -> Question:
    """A question about the picture: the kind drawn first, so that kinds with many instances do not crowd out others."""
    every = questions(picture)
    kinds = sorted({q.kind for q in every})
    kind = kinds[rng.integers(len(kinds))]
    matching = [q for q in every if q.kind == kind]
    if kind in ("exists", "absent"):  # most shapes and colours that one can ask for are not there
        answer = ("no", "yes")[rng.integers(2)]
        matching = [q for q in matching if q.answer == answer]
    chosen = matching[rng.integers(len(matching))]
    if picture.family == "sign" and rng.random() < 0.5:
        return replace(chosen, text=chosen.text.lower())
    return chosen


def step_truth(picture: Picture, step: str) -> bool | None:
    """Whether a written reasoning step is true of the picture; None where it states nothing that can be checked.

    Any of the world's wordings (`wording.FORMS`) is understood. A colour, shape or chart that the picture does not hold
    makes the statement false.
    """
    found = wording.read(step)
    if found is None:
        return None
    kind, slots = found
    values, denied = dict(picture.values), bool(slots.get("no"))
    noun, _, most, least = CHART_WORDS.get(picture.family, ("object", "", "", ""))
    if kind in ("sum", "difference"):
        a, b, result = int(slots["a"]), int(slots["b"]), int(slots["r"])
        return (a + b if kind == "sum" else a - b) == result
    if kind == "more":
        return (int(slots["a"]) > int(slots["b"])) != denied
    if kind == "relation":
        scale = ROWS if slots["rel"] == "above" else COLUMNS
        w, u = slots["w"], slots["u"]
        return w in scale and u in scale and (scale.index(w) < scale.index(u)) != denied
    if kind == "value":
        return slots.get("n", noun) == noun and values.get(slots["c"]) == int(slots["v"])
    if kind == "extreme":
        best = {most: max, least: min}.get(slots["m"])
        return bool(values) and best is not None and values.get(slots["c"]) == best(values.values())
    if kind == "list":
        names = list(values) or [f"{c} {s}" for c, s, _ in picture.objects]
        return slots.get("k", noun) == noun and sorted(slots["l"].split(", ")) == sorted(names)
    if kind == "place":
        return picture.cell(slots["c"], slots["s"]) == slots["p"]
    if picture.family != "sign":
        return False
    ((color, shape, _),) = picture.objects
    if kind == "sign":
        return (slots["c"], slots["s"]) == (color, shape)
    return (slots["x"] in (shape, f"{color} shape")) != denied


def picture_record(picture: Picture) -> dict[str, object]:
    """The picture as a JSON object."""
    return asdict(picture)


def picture_from_record(record: Mapping[str, Any]) -> Picture:
    """The picture of a JSON object that `picture_record` made.

    Raises:
        KeyError, TypeError, ValueError: it is no such object.
    """
    if record["family"] not in FAMILIES:
        raise ValueError(f"no family {record['family']!r}")
    values = tuple((str(c), int(v)) for c, v in record["values"])
    objects = tuple((str(c), str(s), str(p)) for c, s, p in record["objects"])
    return Picture(record["family"], values, objects)
