r"""Plain text of what models write: one character for each meaning, and LaTeX as it would be typed by hand.

`\boxed{\frac{1}{2}}` becomes `1/2`, `５` becomes `5`, and a minus sign becomes a hyphen. Two LaTeX parsers were tried
in its place: pylatexenc forgets what braces group, so that `\frac{x+1}{2}` becomes `x+1/2`, and SymPy's reads a formula
alone, but not a sentence that holds one.
"""

from __future__ import annotations

import re
import unicodedata

# The Turkish letters among them match "i" where case is ignored, but lower() keeps them, so that tables lack the word.
_LOOKALIKES = str.maketrans("‐‑‒–—―−‘’‚‛′ʼ“”„‟″⁄∕⋅∙·✕✖º˚。∶【】İı", "-------''''''\"\"\"\"\"//×××××°°.:[]Ii")
_BEFORE_NFKC = _LOOKALIKES | {0x2460 + n: f"({n + 1})" for n in range(20)}  # ① and so on, which NFKC makes 1


def plain_characters(text: str) -> str:
    """`text` in Unicode form NFKC without invisible characters, and with one character for those that look alike.

    NFKC alone would make x2, 21/2 and 102 of x², 2½ and 10₂, so these are rewritten before it: x^2, 2 ½ and 10_2.
    """
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").translate(_BEFORE_NFKC)
    text = re.sub(r"([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^\1", text)
    text = re.sub(r"([¼-¾⅐-⅞])", r" \1 ", text)
    text = re.sub(r"(?<=\d)([₀-₉]+)", r"_\1", text)
    text = unicodedata.normalize("NFKC", text).translate(_LOOKALIKES)
    return text.replace(">=", "≥").replace("<=", "≤").replace("!=", "≠").replace("+/-", "±")


_ESCAPED = str.maketrans("${}", "＄｛｝")  # stand-ins for \$ \{ \} while $ { } are read as syntax; NFKC left no others
_UNESCAPED = str.maketrans("＄｛｝", "${}")
_SYMBOL_NAMES = (
    "times× cdot× ast× div÷ pm± approx≈ sim≈ infty∞ circ° degree° le≤ leq≤ leqslant≤ ge≥ geq≥ geqslant≥ lt< gt> ne≠ "
    "neq≠ angle∠ triangle△ perp⊥ parallel∥ cup∪ cap∩ to→ rightarrow→ lvert| rvert| vert| mid|"
)
_SYMBOLS = {name[:-1]: name[-1] for name in _SYMBOL_NAMES.split()}
_SYMBOLS |= dict.fromkeys(
    ["left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "displaystyle", "textstyle", "limits"], ""
)
_SYMBOLS |= {"quad": " ", "qquad": " "} | {
    name: name for name in ["sin", "cos", "tan", "log", "ln", "exp", "lim", "min", "max", "gcd", "deg"]
}
_WRAPPER = re.compile(
    r"boxed|fbox|mbox|emph|operatorname|underline|(?:text|math)(?:bf|it|rm|sf|tt|normal|md|up)?|pmb|boldsymbol"
)
# Dollar signs enclose maths by the rules of pandoc, so that "$5 and $10" and "$5-$10" stay money.
_MATHS = re.compile(r"^\$ ?([^$]+?) ?\$$|\$(?! )([^$]+)(?<! )\$(?!\d)")
_FRACTION = re.compile(r"\\[dtc]?frac *(?:\{([^{}]*)\}|(\d)) *(?:\{([^{}]*)\}|(\d))")
_POWER = re.compile(r"(?<=[\^_])\{([^{}]*)\}(?!\d)")
_ROOT = re.compile(
    r"(?:\\sqrt|√|(?P<cube>∛)) *(?:\[(?P<degree>[^\[\]{}]*)\])? *"
    r"(?:\{(?P<braced>[^{}]+)\}|\((?P<bracketed>[^(){}]+)\)|(?P<plain>\d+(?:\.\d+)?|[^\W\d_]))"
)
_COMMAND = re.compile(r"\\(?![dtc]?frac|sqrt)([A-Za-z]+) *\{([^{}]*)\}")


def _symbol(match: re.Match[str]) -> str:
    name = match[1]
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    letter = re.sub(r"^var", "", name)
    try:
        return unicodedata.lookup(f"GREEK {'CAPITAL' if letter[0].isupper() else 'SMALL'} LETTER {letter}")
    except KeyError:
        return match[0]


def _grouped(content: str) -> str:
    return content if re.fullmatch(r".|-?[\d.,]+", content) else f"({content})"


def _root(match: re.Match[str]) -> str:
    degree = "3" if match["cube"] else match["degree"] or "2"
    content = match["braced"] or match["bracketed"] or match["plain"]
    return f" sqrt({content}) " if degree == "2" else f" ({content})^(1/{degree}) "


def without_latex(text: str) -> str:
    """`text`, from `plain_characters`, with LaTeX as plain text. Unknown commands stay: they tell answers apart."""
    text = text.replace("~", " ") if "\\" in text else text  # a space there, as is `\,` but within 1\,000
    text = re.sub(r"(?<=\d)\\,(?=\d)", "", text)
    text = re.sub(r"\\([;:, ])|\\[!()\[\]]", lambda m: " " if m[1] else "", text)
    text = re.sub(r"\\([${}%#&_])", lambda m: m[1].translate(_ESCAPED), text)
    text = _MATHS.sub(lambda m: m[1] or m[2], text.replace("$$", "$"))
    text = re.sub(r"\\([A-Za-z]+)", _symbol, text.replace("{,}", ","))
    before = None
    while text != before:  # from the innermost braces outwards; each round removes some
        before = text
        text = _ROOT.sub(_root, text)
        text = _FRACTION.sub(lambda m: f" {_grouped(m[1] or m[2] or '')}/{_grouped(m[3] or m[4] or '')} ", text)
        text = _POWER.sub(lambda m: _grouped(m[1]), text)
        text = _COMMAND.sub(lambda m: m[2] if _WRAPPER.fullmatch(m[1]) else f"{m[1]}({m[2]})", text)
    text = re.sub(r"(?<![A-Za-z\\]) sqrt|sqrt(?=\()", lambda m: m[0].strip(), text).translate(_UNESCAPED)
    text = re.sub(r"\btriangle (?=[A-Z])", "△", re.sub(r"\bangle (?=[A-Z])", "∠", text)).replace("infinity", "∞")
    text = re.sub(r"([∠△]) ", r"\1", re.sub(r"\^\((\d*[+-])\)", r"^\1", text))  # Ca^{2+}
    text = re.sub(r"(?<=\d)\^\(?(st|nd|rd|th)\)?(?!\w)", r"\1", text)  # 1^{st}
    return re.sub(r"(?<=[A-Za-z])_(?=\d)", "", text).replace("^°", "°")  # CO_2 is CO₂ is CO2
