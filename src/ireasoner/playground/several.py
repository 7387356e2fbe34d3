"""Items of several images whose truth is known: pairs of pictures to compare, and clips of a shape that moves.

A reasoning step about one of several images names it before a statement that the world knows: "Image 2: the red bar
reaches 3." or "Last frame: the red circle is at the top left." Whatever is true of single pictures is asked of `world`,
which the functions here fall back on, so that they take a `Picture` as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from ireasoner.playground import wording, world
from ireasoner.playground.world import CELLS, COLORS, SHAPES, Picture, Style, WorldQuestion

Kind = Literal["pictures", "pairs", "clips"]
FRAMES = 6
# Each direction, and the cells between which a shape goes that way: the row or the column of the place is kept.
WAYS = {
    "right": ("{} left", "{} right", world.ROWS),
    "left": ("{} right", "{} left", world.ROWS),
    "down": ("top {}", "bottom {}", world.COLUMNS),
    "up": ("bottom {}", "top {}", world.COLUMNS),
}


@dataclass(frozen=True)
class Pair:
    """Two pictures of one family."""

    first: Picture
    second: Picture
    family: Literal["pair"] = "pair"

    @property
    def seen(self) -> dict[str, Picture]:
        """What a step may speak of, by how it names it."""
        return {"image 1": self.first, "image 2": self.second}


@dataclass(frozen=True)
class Motion:
    """A shape that goes from one cell to another while a second one stays where it is."""

    color: str
    shape: str
    way: str
    start: str
    end: str
    still: tuple[str, str, str]  # color, shape and cell
    family: Literal["motion"] = "motion"

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def seen(self) -> dict[str, Picture]:
        """What a step may speak of, by how it names it."""
        ends = {"first frame": self.start, "last frame": self.end}
        return {
            which: Picture("scene", objects=((self.color, self.shape, cell), self.still))
            for which, cell in ends.items()
        }


Thing = Picture | Pair | Motion


def sample(kind: Kind, rng: np.random.Generator, family: world.Family | None, items: tuple[int, int]) -> Thing:
    """Draw what an item shows. `family` and `items` are as for `world.sample_picture`; a clip has none."""
    if kind == "clips":
        return _sample_motion(rng)
    first = world.sample_picture(rng, family, items)
    return first if kind == "pictures" else Pair(first, world.sample_picture(rng, first.family, items))


def _sample_motion(rng: np.random.Generator) -> Motion:
    way = tuple(WAYS)[rng.integers(len(WAYS))]
    start, end, lines = WAYS[way]
    line = lines[rng.integers(3)]
    moving, still = rng.choice(len(COLORS) * len(SHAPES), 2, replace=False).tolist()
    free = [cell for cell in CELLS if line not in cell.split()]  # nothing is in the way
    place = free[rng.integers(len(free))]
    colors, shapes = zip(*((COLORS[i // len(SHAPES)], SHAPES[i % len(SHAPES)]) for i in (moving, still)), strict=True)
    return Motion(colors[0], shapes[0], way, start.format(line), end.format(line), (colors[1], shapes[1], place))


def draw(thing: Thing, style: Style, rng: np.random.Generator) -> list[Image.Image]:
    """The images of an item: one, two, or the frames of a clip."""
    if isinstance(thing, Picture):
        return [world.draw(thing, style, rng)]
    if isinstance(thing, Pair):
        return [world.draw(picture, style, rng) for picture in (thing.first, thing.second)]
    # Every frame is drawn with the same random numbers: hues, grain and places that are not meant to move stay.
    seed, (x0, y0), (x1, y1), still = int(rng.integers(2**32)), _center(thing.start), _center(thing.end), thing.still
    frames = []
    for k in range(FRAMES):
        along = k / (FRAMES - 1)
        place = x0 + (x1 - x0) * along, y0 + (y1 - y0) * along
        shapes = [(thing.color, thing.shape, place), (still[0], still[1], _center(still[2]))]
        frames.append(world.draw_shapes(shapes, style, np.random.default_rng(seed)))
    return frames


def _center(cell: str) -> tuple[float, float]:
    """The middle of a cell, in pixels."""
    row, column = divmod(CELLS.index(cell), 3)
    return 14.0 + 28 * column, 14.0 + 28 * row


# --- what is true, in English -----------------------------------------------------------------------------------------


def facts(thing: Pair | Motion) -> list[str]:
    """What there is to see, as the steps of solutions say it."""
    return [
        f"{which.capitalize()}: {fact[0].lower()}{fact[1:]}"
        for which, picture in thing.seen.items()
        for fact in world.facts(picture)
    ]


def questions(thing: Thing) -> tuple[WorldQuestion, ...]:
    """Every question that has a true answer, in a fixed order."""
    if isinstance(thing, Picture):
        return world.questions(thing)
    return tuple(_motion_questions(thing) if isinstance(thing, Motion) else _pair_questions(thing))


def solve(thing: Thing, question: str) -> WorldQuestion | None:
    """As `world.solve`."""
    if isinstance(thing, Picture):
        return world.solve(thing, question)
    text = " ".join(question.split())
    return next((known for known in questions(thing) if known.text == text), None)


def sample_question(thing: Thing, rng: np.random.Generator) -> WorldQuestion:
    """As `world.sample_question`: first the kind, then one of it."""
    if isinstance(thing, Picture):
        return world.sample_question(thing, rng)
    every = questions(thing)
    kinds = sorted({question.kind for question in every})
    kind = kinds[rng.integers(len(kinds))]
    matching = [question for question in every if question.kind == kind]
    if {question.answer for question in matching} == {"yes", "no"}:  # who always denies would be right nearly always
        answer = ("no", "yes")[rng.integers(2)]
        matching = [question for question in matching if question.answer == answer]
    return matching[rng.integers(len(matching))]


def step_truth(thing: Thing, step: str) -> bool | None:
    """As `world.step_truth`; a step that names no image states something of the whole item."""
    if isinstance(thing, Picture):
        return world.step_truth(thing, step)
    text = " ".join(step.split()).rstrip(".").lower()
    which, names_one, statement = text.partition(": ")
    if names_one:
        picture = thing.seen.get(which)
        return world.step_truth(picture, statement) if picture else None
    if isinstance(thing, Motion) and (found := re.fullmatch(r"the (\w+ \w+) goes (right|left|up|down)", text)):
        return (found[1], found[2]) == (thing.name, thing.way)
    read = wording.read(step)
    arithmetic = read is not None and read[0] in ("sum", "difference", "more")
    return world.step_truth(next(iter(thing.seen.values())), step) if arithmetic else None


def _pair_questions(pair: Pair) -> Iterator[WorldQuestion]:
    both = (pair.first, pair.second)
    lines = facts(pair)
    if pair.first.family == "sign":
        (one, other) = (picture.objects[0] for picture in both)
        for place, what in enumerate(("color", "shape")):
            answer = "yes" if one[place] == other[place] else "no"
            yield WorldQuestion(f"Do both images show the same {what}?", tuple(lines), answer, "same")
        return
    noun = wording.CHART_WORDS.get(pair.first.family, ("object",))[0]
    counts = [len(world.facts(picture)) for picture in both]
    if counts[0] != counts[1]:
        more = f"{max(counts)} is more than {min(counts)}."
        answer = "first" if counts[0] > counts[1] else "second"
        yield WorldQuestion(f"Which image has more {noun}s, the first or the second?", (*lines, more), answer, "more")
    total = f"{counts[0]} + {counts[1]} = {sum(counts)}."
    text = f"How many {noun}s are there in both images together?"
    yield WorldQuestion(text, (*lines, total), str(sum(counts)), "total")
    values = [dict(picture.values) for picture in both]
    for color in values[0].keys() & values[1].keys() if values[0] else ():
        x, y = values[0][color], values[1][color]
        read = tuple(line for line in lines if f"the {color} {noun}" in line)
        yield WorldQuestion(f"What do the {color} {noun}s of both images add up to?", (*read, f"{x} + {y} = {x + y}."),
                            str(x + y), "sum")  # fmt: skip
        if x != y:
            answer = "first" if x > y else "second"
            steps = (*read, f"{max(x, y)} is more than {min(x, y)}.")
            yield WorldQuestion(f"Which image shows more {color}, the first or the second?", steps, answer, "color")


def _motion_questions(motion: Motion) -> Iterator[WorldQuestion]:
    name = motion.name
    first, _, last, _ = facts(motion)  # of each of the two frames, what moves and what stays
    goes = f"The {name} goes {motion.way}."
    yield WorldQuestion(f"Which way does the {name} go?", (first, last, goes), motion.way, "way")
    for way in WAYS:
        answer = "yes" if way == motion.way else "no"
        yield WorldQuestion(f"Does the {name} go {way}?", (first, last, goes), answer, "goes")
    yield WorldQuestion(f"Where is the {name} at the start?", (first,), motion.start, "start")
    yield WorldQuestion(f"Where is the {name} at the end?", (last,), motion.end, "end")
    yield WorldQuestion("What moves?", (first, last, goes), name, "what")


# --- records ----------------------------------------------------------------------------------------------------------

_SEVERAL: TypeAdapter[Pair | Motion] = TypeAdapter(Pair | Motion)


def record(thing: Thing) -> dict[str, object]:
    """What an item shows as a JSON object."""
    return world.picture_record(thing) if isinstance(thing, Picture) else asdict(thing)


def from_record(found: Mapping[str, Any]) -> Thing:
    """The inverse of `record`.

    Raises:
        ValueError: the world cannot draw such an item.
    """
    if found.get("family") not in ("pair", "motion"):
        return world.picture_from_record(found)
    thing = _SEVERAL.validate_python(found)
    if isinstance(thing, Pair):
        pictures = [world.picture_from_record(asdict(picture)) for picture in (thing.first, thing.second)]
        possible = pictures[0].family == pictures[1].family
    else:
        possible = thing.way in WAYS and {thing.start, thing.end, thing.still[2]} <= set(CELLS)
    if not possible:
        raise ValueError(f"there is no such {thing.family} as {found}")
    return thing
