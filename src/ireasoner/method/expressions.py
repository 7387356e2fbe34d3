"""Formulas: `expression` writes those that are equal by value, or differ in order and signs only, in one form.

Python's own parser reads the formula and SymPy, which torch needs anyway, holds it. SymPy's parsers are not used: they
run what they read. Every bound here is on sizes, so that no formula can ask for more work than its length.
"""

from __future__ import annotations

import ast
import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sympy

MAX_LENGTH, MAX_DIGITS, MAX_EXPONENT = 128, 15, 20  # of a formula; of a number; of a power
MAX_ROOTS = 4  # clearing a denominator of them may double its length for each

_TOKEN = re.compile(
    r" *(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<sign>[-+*/^()×÷])|"
    r"(?P<name>sqrt|sin|cos|tan|log|ln|(?<![a-z])pi(?![a-z])|[^\W\d_]))"
)
_OPERATORS = {"×": "*", "÷": "/", "^": "**"}


@lru_cache(4096)
def expression(text: str) -> str | None:
    """The canonical form of a formula whose letters stand alone, such as `9*pi/4` for `(9π)/4`; None if it is none.

    Numbers are exact, and irrational ones are simplified: `sqrt(12)` is `2*sqrt(3)`, and `1/sqrt(2)` is `sqrt(2)/2`.
    Terms are put in order, but what holds letters is not multiplied out: to factor `x^2 + x` may have been the task.
    Sums and products of plain numbers are left alone: `3-5` may be a range, `3×4` a size. `text` is without LaTeX.
    """
    plain = not re.search(r"[^\W\d_]", text)
    if len(text) > MAX_LENGTH or text.count("sqrt") > MAX_ROOTS or (plain and re.search(r"[+*×]|(?<=.)-|/.*/", text)):
        return None
    if re.search(r"\de[-+]?\d|[ap]\.?m\b", text) or re.search(
        r"[^\W\d_]{3}", re.sub(r"sqrt|sin|cos|tan|log|ln|(?<![a-z])pi(?![a-z])", "", text)
    ):
        return None
    value = _evaluated(text.casefold())
    if value is None:
        return None
    import sympy

    if value.has(sympy.zoo, sympy.nan, sympy.oo):
        return None
    if not value.free_symbols and not value.has(sympy.Function):
        value = sympy.expand(value)
        value = value if value.has(sympy.pi) else sympy.expand(sympy.radsimp(value))
    return str(Fraction(value.p, value.q)) if isinstance(value, sympy.Rational) else str(value)


def arithmetic(text: str) -> str | None:
    """The value of a calculation with plain numbers, such as `15` for `60 - 45`; None for anything else."""
    if len(text) > MAX_LENGTH or not re.fullmatch(r"[\d .+*/()×÷-]+", text):
        return None
    value = _evaluated(text.strip())
    return str(value) if value is not None and value.is_finite else None


def _evaluated(text: str) -> sympy.Expr | None:
    """The value of a formula as SymPy holds it; None for what is no formula or too large."""
    source = _in_python(text)
    try:
        return None if source is None else _value(ast.parse(source, mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _in_python(text: str) -> str | None:
    """A formula as Python would write it, with numbers in quotes; None where it is none, or a product is in doubt."""
    if not re.search(r"\d|sqrt|π|\bpi\b", text) or not re.search(r"[-+*/^()×÷π]|\d[^\W\d_]|\bpi\b", text):
        return None
    parts: list[str] = []
    before, position = "", 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            return None
        number, sign, name = match.groups("")
        starts = number or name or sign == "("
        if starts and (before == "letter" and (number or sign)):  # x2 and f(x) are no products
            return None
        if starts and before in ("number", "letter", ")"):
            parts.append("*")
        parts.append(f"'{number}'" if number else {"π": "pi"}.get(name, name) or _OPERATORS.get(sign, sign))
        before = "number" if number or name in ("π", "pi") else "letter" if len(name) == 1 else sign
        position = match.end()
    return "".join(parts)


def _value(node: ast.expr) -> sympy.Expr:
    """The value of a parsed formula. Raises `ValueError` for what is no formula or too large."""
    import sympy

    match node:
        case ast.Constant(value=str(digits)) if len(digits) <= MAX_DIGITS:
            return sympy.Rational(digits)
        case ast.Name(id="pi"):
            return sympy.pi
        case ast.Name(id=letter) if len(letter) == 1:
            return sympy.Symbol(letter)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument]):
            return _power(_value(argument), sympy.Rational(1, 2))
        case ast.Call(func=ast.Name(id=function), args=[argument]):
            return sympy.Function(function)(_value(argument))
        case ast.BinOp(left=left, op=operator, right=right):
            one, other = _value(left), _value(right)
            match operator:
                case ast.Add():
                    return one + other
                case ast.Sub():
                    return one - other
                case ast.Mult():
                    return one * other
                case ast.Div():
                    return one / other
                case ast.Pow():
                    return _power(one, other)
    raise ValueError


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """`base` to a power, if it is small enough to be written."""
    import sympy

    if not isinstance(exponent, sympy.Rational):
        if isinstance(base, sympy.Rational) or exponent.free_symbols:
            return sympy.Pow(base, exponent, evaluate=False)
        raise ValueError
    if abs(exponent.p) > MAX_EXPONENT or base.is_zero:
        raise ValueError
    digits = len(str(base)) * max(abs(exponent.p), 1)
    if isinstance(base, sympy.Rational) and digits > (64 if exponent.q == 1 else MAX_DIGITS):
        raise ValueError
    if base.is_Add and not base.free_symbols and abs(exponent.p) > 2:
        raise ValueError
    power = base**exponent
    if exponent.q > 2 and isinstance(base, sympy.Rational) and not power.is_Rational:
        raise ValueError  # SymPy has several forms for a cube root: it stays text
    return power
