"""A small visual world whose truth is known: charts of three kinds, scenes of shapes, and signs, all generated.

A `Picture` is the truth about an image. `draw` turns it into the image in a given `Style`; `questions` lists what can
be asked about it; `solve` answers a question that is written in English, with true reasoning steps; `step_truth` says
whether a written reasoning step is true. Every random choice comes from the `numpy.random.Generator` of the caller, in
a fixed order: whoever inserts a draw changes every image, question and training example that follows it.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pydantic import TypeAdapter

from ireasoner.playground import wording

Family = Literal["bars", "dots", "pie", "scene", "sign"]
FAMILIES: tuple[Family, ...] = get_args(Family)
IMAGE_SIZE = 84  # pixels: 6 x 6 patches of 14, which become 9 image tokens after the 2 x 2 merge
PIE_PARTS = 8
HUES = {"red": 0.0, "orange": 0.085, "yellow": 0.155, "green": 0.36, "blue": 0.61, "purple": 0.79}
COLORS = tuple(HUES)
SHAPES = ("circle", "square", "triangle", "cross")
# Signs come in more colors and shapes. A color is a hue, a share of the style's saturation and one of its brightness.
SIGN_COLORS = {
    **{name: (hue, 1.0, 1.0) for name, hue in HUES.items()},
    "teal": (0.5, 1.0, 0.6), "brown": (0.02, 0.85, 0.65), "gray": (0.0, 0.0, 0.6), "black": (0.0, 0.0, 0.0),
}  # fmt: skip
SIGN_SHAPES = (*SHAPES, "rectangle")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)


@dataclass(frozen=True)
class Picture:
    """What is true of one image: a chart has values, a scene has objects, and a sign has one object."""

    family: Family
    values: tuple[tuple[str, int], ...] = ()  # color and value, in reading order
    objects: tuple[tuple[str, str, str], ...] = ()  # color, shape and cell, in reading order; a sign's cell is empty


@dataclass(frozen=True)
class WorldQuestion:
    """A question about a picture, with true reasoning steps and the true answer."""

    text: str
    steps: tuple[str, ...]
    answer: str
    kind: str


@dataclass(frozen=True)
class Style:
    """How a picture is drawn. The defaults are the `plain` style.

    Colors are fractions of full scale, and lengths are pixels of the final image.
    """

    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    saturation: float = 0.9
    brightness: float = 0.85
    hue_jitter: float = 0.0  # largest shift of an item's hue, as a fraction of the color circle
    outline: float = 0.0  # width; 0: none
    filled: float = 1.0  # opacity of the filling; 0: outline alone
    noise: float = 0.0  # standard deviation, in gray levels of 255
    blur: float = 0.0
    jitter: float = 0.0  # largest displacement of an item
    grid: bool = False
    thickness: float = 0.7  # share of its slot that an item fills


def sample_style(name: str, rng: np.random.Generator) -> Style:
    """Draw a style from a named family of styles.

    `varied` has solid colors on light or dark paper: the tiny LMM was pre-trained on it. `chalk` has pale hollow
    outlines on a dark, grainy board: the demo's unlabeled images are drawn in it. `plain` has no variety.

    Raises:
        ValueError: there is no such family of styles.
    """
    u = rng.uniform
    if name == "plain":
        return Style()
    if name == "varied":
        dark = rng.random() < 0.3
        return Style(
            background=_background(u(0.05, 0.35) if dark else u(0.8, 1.0), 0.06, rng),
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
        return Style(
            background=_background(u(0.05, 0.3), 0.04, rng),
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


def _background(gray: float, tint: float, rng: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = (float(np.clip(gray + rng.uniform(-tint, tint), 0, 1)) for _ in range(3))
    return red, green, blue


def sample_picture(rng: np.random.Generator, family: Family | None = None, items: tuple[int, int] = (2, 4)) -> Picture:
    """Draw a picture.

    Args:
        family: the kind of picture; None: any.
        items: the least and the most bars, rows, slices or objects that it holds, which sets the difficulty. A sign
            always has one.
    """
    family = family or FAMILIES[rng.integers(len(FAMILIES))]
    if family == "sign":
        color, shape = tuple(SIGN_COLORS)[rng.integers(len(SIGN_COLORS))], SIGN_SHAPES[rng.integers(len(SIGN_SHAPES))]
        return Picture("sign", objects=((color, shape, ""),))
    count = int(rng.integers(items[0], items[1] + 1))
    if family == "scene":
        pairs = rng.choice(len(COLORS) * len(SHAPES), count, replace=False)
        cells = rng.choice(len(CELLS), count, replace=False)
        found = {int(c): (COLORS[p // len(SHAPES)], SHAPES[p % len(SHAPES)]) for p, c in zip(pairs, cells, strict=True)}
        return Picture("scene", objects=tuple((*found[c], CELLS[c]) for c in sorted(found)))
    colors = [COLORS[i] for i in rng.choice(len(COLORS), count, replace=False)]
    if family == "pie":
        cuts = np.sort(rng.choice(np.arange(1, PIE_PARTS), count - 1, replace=False))
        values = np.diff(np.concatenate([[0], cuts, [PIE_PARTS]]))
    else:
        values = sample_values(family, count, rng)
    return Picture(family, values=tuple((c, int(v)) for c, v in zip(colors, values, strict=True)))


def sample_values(family: Family, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the lengths of a chart's bars, which go up to 9, or of its rows of dots, which fit up to 6."""
    return rng.integers(1, 10 if family == "bars" else 7, count)


# --- drawing ---------------------------------------------------------------------------------------------------------

_SCALE = 3  # a picture is drawn three times too large and then reduced, which makes its edges smooth


def draw(picture: Picture, style: Style, rng: np.random.Generator) -> Image.Image:
    """Draw a picture as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    canvas = _Canvas(style, rng)
    drawers = {"bars": _draw_bars, "dots": _draw_dots, "pie": _draw_pie, "scene": _draw_scene, "sign": _draw_sign}
    drawers[picture.family](canvas, picture)
    return _finished(canvas)


def draw_shapes(
    shapes: Iterable[tuple[str, str, tuple[float, float]]], style: Style, rng: np.random.Generator
) -> Image.Image:
    """Draw shapes, given by color, shape and the pixels of their centers, as an image of the same size."""
    canvas = _Canvas(style, rng)
    for color, shape, (x, y) in shapes:
        _draw_shape(canvas.pen, shape, _scaled(x, y, 5 + 8 * style.thickness), canvas.look(color))
    return _finished(canvas)


def _finished(canvas: _Canvas) -> Image.Image:
    """The drawn image in its size, as blurred and as grainy as its style has it."""
    style, rng = canvas.style, canvas.rng
    image = canvas.image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    if style.blur > 0.05:
        image = image.filter(ImageFilter.GaussianBlur(style.blur))
    if style.noise:
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels + rng.normal(0.0, style.noise, (IMAGE_SIZE, IMAGE_SIZE, 1)).astype(np.float32)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image


class _Canvas:
    """The enlarged image while it is drawn, and the style's variation from item to item."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self.style, self.rng = style, rng
        background = tuple(round(255 * c) for c in style.background)
        self.image = Image.new("RGB", (IMAGE_SIZE * _SCALE, IMAGE_SIZE * _SCALE), background)
        self.pen = ImageDraw.Draw(self.image)
        self.ink = 0.25 if np.mean(style.background) > 0.5 else 0.85  # gray of the lines, dark on light paper

    def shake(self) -> float:
        """A small random displacement."""
        return float(self.rng.uniform(-1, 1) * self.style.jitter)

    def look(self, color: str) -> dict[str, Any]:
        """The filling and the outline of one item, as Pillow's drawing methods take them.

        Hues differ a little from item to item, so that a color's name stands for a range of hues and not for one pixel
        value. The range is much narrower than the distance of neighboring hues.
        """
        style = self.style
        hue, saturation, brightness = SIGN_COLORS[color]
        hue = (hue + self.rng.uniform(-1, 1) * style.hue_jitter) % 1.0
        rgb = np.array(colorsys.hsv_to_rgb(hue, style.saturation * saturation, style.brightness * brightness))
        fill = style.filled * rgb + (1 - style.filled) * np.array(style.background)
        # On a solid item an outline of the same color would not show. On a hollow one it alone carries the color.
        edge = rgb * 0.75 if style.filled == 1.0 else rgb
        if color == "black" and self.ink > 0.5:  # black is solid with a gray edge on a dark board, or it would not show
            fill, edge = np.zeros(3), np.full(3, 0.6)
        width = round(style.outline * _SCALE)
        return {
            "fill": tuple(int(255 * c) for c in fill),
            "outline": tuple(int(255 * c) for c in edge) if width else None,
            "width": max(width, 1),
        }

    def grid(self, *, horizontal: bool) -> None:
        """Faint lines behind a chart, where the style has them."""
        faint = tuple(round(255 * (0.75 * c + 0.25 * self.ink)) for c in self.style.background)
        for level in range(6, 79, 24) if self.style.grid else ():
            ends = (6, level, 78, level) if horizontal else (level, 6, level, 78)
            self.pen.line(_scaled(*ends), fill=faint, width=_SCALE)


def _scaled(*lengths: float) -> list[float]:
    return [length * _SCALE for length in lengths]


def _draw_bars(canvas: _Canvas, picture: Picture) -> None:
    canvas.grid(horizontal=True)
    slot = 72 / len(picture.values)
    half = min(slot, 28) * canvas.style.thickness / 2
    for i, (color, value) in enumerate(picture.values):
        middle = 6 + (i + 0.5) * slot + canvas.shake()
        canvas.pen.rectangle(_scaled(middle - half, 78 - 8 * value, middle + half, 78), **canvas.look(color))
    canvas.pen.line(_scaled(4, 78, 80, 78), fill=(round(255 * canvas.ink),) * 3, width=_SCALE)


def _draw_dots(canvas: _Canvas, picture: Picture) -> None:
    canvas.grid(horizontal=False)
    slot = 72 / len(picture.values)
    radius = 5.5 * canvas.style.thickness + 0.5
    for i, (color, value) in enumerate(picture.values):
        y, x0, look = 6 + (i + 0.5) * slot + canvas.shake(), 12 + canvas.shake(), canvas.look(color)
        for x in (x0 + 12 * k for k in range(value)):
            canvas.pen.ellipse(_scaled(x - radius, y - radius, x + radius, y + radius), **look)


def _draw_pie(canvas: _Canvas, picture: Picture) -> None:
    angle, x, y = -90.0, 42 + canvas.shake(), 42 + canvas.shake()
    radius = 24 + 14 * canvas.style.thickness
    for color, value in picture.values:
        box, sweep = _scaled(x - radius, y - radius, x + radius, y + radius), 360 * value / PIE_PARTS
        canvas.pen.pieslice(box, angle, angle + sweep, **canvas.look(color))
        angle += sweep


def _draw_scene(canvas: _Canvas, picture: Picture) -> None:
    for color, shape, cell in picture.objects:
        row, column = divmod(CELLS.index(cell), 3)
        x, y = 14 + 28 * column + canvas.shake(), 14 + 28 * row + canvas.shake()
        _draw_shape(canvas.pen, shape, _scaled(x, y, 5 + 8 * canvas.style.thickness), canvas.look(color))


def _draw_sign(canvas: _Canvas, picture: Picture) -> None:
    ((color, shape, _),) = picture.objects
    r = canvas.rng.uniform(6, 20)
    x, y = canvas.rng.uniform(r + 2, IMAGE_SIZE - r - 2, 2)
    look, ratio = canvas.look(color), float(canvas.rng.uniform(0.4, 0.75))
    _draw_shape(canvas.pen, shape, _scaled(x, y, r), look, ratio)


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, circle: list[float], look: dict[str, Any], ratio: float = 0.6
) -> None:
    """Draw a shape of about the size of a circle.

    Args:
        circle: x and y of the center, and the radius, in pixels of the enlarged image.
        ratio: of a rectangle, the short side over the long one. Its third decimal says whether the rectangle is lying
            or standing, which saves a random number.
    """
    x, y, r = circle
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], **look)
    elif shape in ("square", "rectangle"):
        long, short = (0.9 * r, 0.9 * r) if shape == "square" else (0.95 * r, ratio * 0.95 * r)
        w, h = (long, short) if round(ratio * 1000) % 2 else (short, long)
        pen.rectangle([x - w, y - h, x + w, y + h], **look)
    elif shape == "triangle":
        angles = (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)
        pen.polygon([(x + r * math.cos(a), y + 0.15 * r + r * math.sin(a)) for a in angles], **look)
    else:
        t = 0.33 * r  # half the width of an arm
        corners = [
            (-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t),
            (t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t),
        ]  # fmt: skip
        pen.polygon([(x + dx, y + dy) for dx, dy in corners], **look)


# --- what is true, in English ----------------------------------------------------------------------------------------


def facts(picture: Picture) -> tuple[str, ...]:
    """Every item of the picture as a sentence, in reading order."""
    if picture.family == "sign":
        return tuple(f"The shape is a {color} {shape}." for color, shape, _ in picture.objects)
    if picture.family == "scene":
        return tuple(f"The {color} {shape} is at the {cell}." for color, shape, cell in picture.objects)
    noun, verb, _, _ = wording.CHART_WORDS[picture.family]
    return tuple(f"The {color} {noun} {verb} {value}." for color, value in picture.values)


def questions(picture: Picture) -> tuple[WorldQuestion, ...]:
    """Every question that has a true answer, in a fixed order."""
    if picture.family == "scene":
        return tuple(_scene_questions(picture))
    if picture.family == "sign":
        return tuple(_sign_questions(picture))
    return tuple(_chart_questions(picture))


def solve(picture: Picture, question: str) -> WorldQuestion | None:
    """The true answer to a question; None where it has none, or where the world would word the question otherwise."""
    text = " ".join(question.split())
    if picture.family == "sign":
        return _solve_sign(picture, text)
    return next((known for known in questions(picture) if known.text == text), None)


def _chart_questions(picture: Picture) -> Iterator[WorldQuestion]:
    noun, _, most, least = wording.CHART_WORDS[picture.family]
    values = dict(picture.values)
    lines = dict(zip(values, facts(picture), strict=True))
    pairs = [(a, b, values[a], values[b], (lines[a], lines[b])) for a, b in permutations(values, 2)]
    for color, value in values.items():
        yield WorldQuestion(f"What is the value of the {color} {noun}?", (lines[color],), str(value), "value")
    for word, best in ((most, max(values.values())), (least, min(values.values()))):
        winners = [color for color, value in values.items() if value == best]
        if len(winners) == 1:
            steps = (*lines.values(), f"The {word} is {winners[0]}.")
            yield WorldQuestion(f"Which {noun} is the {word}?", steps, winners[0], "extreme")
    for a, b, x, y, read in pairs:
        if x > y:
            steps = (*read, f"{x} - {y} = {x - y}.")
            yield WorldQuestion(f"How much more is {a} than {b}?", steps, str(x - y), "difference")
    for a, b, x, y, read in pairs:
        steps = (*read, f"{x} + {y} = {x + y}.")
        yield WorldQuestion(f"What do {a} and {b} add up to?", steps, str(x + y), "sum")
    for a, b, x, y, read in pairs:
        steps = (*read, f"{x} is {'' if x > y else 'not '}more than {y}.")
        yield WorldQuestion(f"Is {a} more than {b}?", steps, "yes" if x > y else "no", "compare")
    steps = (f"The {noun}s are {', '.join(values)}.",)
    yield WorldQuestion(f"How many {noun}s are there?", steps, str(len(values)), "count")


def _scene_questions(picture: Picture) -> Iterator[WorldQuestion]:
    lines = facts(picture)
    items = [
        (f"{color} {shape}", cell, line) for (color, shape, cell), line in zip(picture.objects, lines, strict=True)
    ]
    for name, cell, line in items:
        yield WorldQuestion(f"Where is the {name}?", (line,), cell, "where")
    for name, cell, line in items:
        yield WorldQuestion(f"What is at the {cell}?", (line,), name, "what")
    for asked in SHAPES:
        found = [i for i, (_, shape, _) in enumerate(picture.objects) if shape == asked]
        if len(found) == 1:
            steps = (lines[found[0]],)
            yield WorldQuestion(f"What color is the {asked}?", steps, picture.objects[found[0]][0], "color")
    for (a, cell_a, line_a), (b, cell_b, line_b) in permutations(items, 2):
        for relation, scale, part in (("above", ROWS, 0), ("left of", COLUMNS, 1)):
            place_a, place_b = cell_a.split()[part], cell_b.split()[part]
            true = scale.index(place_a) < scale.index(place_b)
            steps = (line_a, line_b, f"{place_a} is {'' if true else 'not '}{relation} {place_b}.")
            yield WorldQuestion(f"Is the {a} {relation} the {b}?", steps, "yes" if true else "no", "relation")
    steps = (f"The objects are {', '.join(name for name, *_ in items)}.",)
    yield WorldQuestion("How many objects are there?", steps, str(len(items)), "count")


def _sign_questions(picture: Picture) -> Iterator[WorldQuestion]:
    things = [*SIGN_SHAPES, *(f"{color} shape" for color in SIGN_COLORS)]
    subjects = {"sign color": ["shape", picture.objects[0][1]], "sign shape": [""]}
    for kind, forms in wording.SIGN_QUESTIONS.items():
        for text in (form.format(x=x) for form in forms for x in subjects.get(kind, things)):
            if found := _solve_sign(picture, text):
                yield found


def _solve_sign(picture: Picture, text: str) -> WorldQuestion | None:
    """Signs are asked about in so many ways, and in small letters too, that the question is parsed, not looked up."""
    ((color, shape, _),), lines = picture.objects, facts(picture)
    kind, asked = wording.read_sign_question(text) or ("", "")
    true = asked in ("shape", shape, f"{color} shape")
    if kind == "sign shape":
        return WorldQuestion(text, lines, shape, kind)
    if kind == "sign color" and true:
        return WorldQuestion(text, lines, color, kind)
    if kind in ("exists", "absent") and (asked in SIGN_SHAPES or asked.removesuffix(" shape") in SIGN_COLORS):
        verdict = f"It is {'' if true else 'not '}a {asked}."
        return WorldQuestion(text, (*lines, verdict), "yes" if true == (kind == "exists") else "no", kind)
    return None


def sample_question(picture: Picture, rng: np.random.Generator) -> WorldQuestion:
    """Draw a question: first its kind, so that kinds with many instances do not crowd out the others."""
    every = questions(picture)
    kinds = sorted({question.kind for question in every})
    kind = kinds[rng.integers(len(kinds))]
    matching = [question for question in every if question.kind == kind]
    if kind in ("exists", "absent"):
        # Most shapes and colors that one can ask for are not there: who always denies would be right nearly always.
        answer = ("no", "yes")[rng.integers(2)]
        matching = [question for question in matching if question.answer == answer]
    chosen = matching[rng.integers(len(matching))]
    if picture.family == "sign" and rng.random() < 0.5:
        return replace(chosen, text=chosen.text.lower())
    return chosen


def step_truth(picture: Picture, step: str) -> bool | None:
    """Whether a written reasoning step is true of the picture; None where it states nothing that can be checked.

    All wordings of `wording.FORMS` are understood. A statement about a color, shape or chart that is not in the picture
    is false.
    """
    found = wording.read(step)
    if found is None:
        return None
    kind, slots = found
    values, denied = dict(picture.values), bool(slots.get("no"))
    noun, _, most, least = wording.CHART_WORDS.get(picture.family, ("object", "", "", ""))
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
        names = list(values) or [f"{color} {shape}" for color, shape, _ in picture.objects]
        return slots.get("k", noun) == noun and sorted(slots["l"].split(", ")) == sorted(names)
    if kind in ("place", "sign"):
        return (slots["c"], slots["s"], slots.get("p", "")) in picture.objects
    if picture.family != "sign":
        return False
    ((color, shape, _),) = picture.objects
    return (slots["x"] in (shape, f"{color} shape")) != denied


# --- records ---------------------------------------------------------------------------------------------------------

_RECORDS = TypeAdapter(Picture)


def picture_record(picture: Picture) -> dict[str, object]:
    """The picture as a JSON object."""
    return asdict(picture)


def picture_from_record(record: Mapping[str, Any]) -> Picture:
    """The picture of a JSON object that `picture_record` made.

    Raises:
        ValueError: the world cannot draw such a picture.
    """
    picture = _RECORDS.validate_python(record)
    if picture.family == "sign":
        possible = len(picture.objects) == 1
    elif picture.family == "scene":
        possible = all(cell in CELLS for *_, cell in picture.objects)
    else:
        possible = 0 < len(dict(picture.values)) == len(picture.values)
    if not possible:
        raise ValueError(f"there is no such {picture.family} as {record}")
    return picture
