"""Rewards: pure functions of (text, reference) that never raise.

Each returns a float, or None where nothing can be said: the reference itself is unreadable. A response without a reward
has no part in its group's mean, and an advantage of 0.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

Reward = Callable[[str, str], float | None]

_LONGEST_NUMBER = 400  # characters; a model may write digits without end
_LONGEST_EXPRESSION = 200
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(/\d+)?")
_FOUND = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:/\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_TOKENS = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|(.))")


def final_answer(text: str, reference: str, last_number: bool = False) -> float | None:
    """1 if the number that a text ends on equals the reference's, else 0; None for a reference without a number.

    The number stands in the last `\\boxed{}`, else after the last `####` (GSM8K), else, if `last_number`, it is the
    last of the text. Thousands' commas, currency, percent signs and units are left out; values are compared exactly.
    """
    wanted = _final(reference, last_number=True)
    if wanted is None:
        return None
    given = _final(text, last_number)
    return float(given is not None and given == wanted)


def boxed(text: str, reference: str) -> float | None:
    """1 if the last balanced `\\boxed{}` of a text is equivalent to the reference, else 0; None for an empty reference.

    The reference may be boxed itself. Equal numbers and equal normalised LaTeX are equivalent; math-verify, where it is
    installed, decides about the rest.
    """
    wanted = last_boxed(reference) or reference.strip()
    if not wanted:
        return None
    given = last_boxed(text)
    if given is None:
        return 0.0
    if _normalised(given) == _normalised(wanted):
        return 1.0
    numbers = _number(given), _number(wanted)
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    return float(_symbolically_equal(given, wanted))


def countdown(text: str, reference: str) -> float | None:
    """Of the last `<answer>...</answer>`: 1 for an expression that is right, 0.1 for another, 0 where there is none.

    reference: JSON {"numbers": [...], "target": n}; None if it is not. Right: digits, + - * / ( ) . and spaces alone,
    every number used exactly once, and a value within 1e-5 of the target.
    """
    try:
        wanted = json.loads(reference)
        numbers, target = Counter(int(number) for number in wanted["numbers"]), Fraction(wanted["target"])
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
        return None
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    if not answers:
        return 0.0
    expression = answers[-1].strip()
    value = evaluate(expression)
    if value is None or Counter(map(int, re.findall(r"[0-9]+", expression))) != numbers:
        return 0.1
    return 1.0 if abs(value - target) <= Fraction(1, 100_000) else 0.1


def choice(text: str, reference: str) -> float | None:
    """1 if the letter that a text chooses is the reference's, else 0; None for a reference without a capital letter.

    The letter is the first capital one in the last `\\boxed{}`, else after the last "answer is".
    """
    wanted = re.search(r"[A-Z]", last_boxed(reference) or reference)
    if wanted is None:
        return None
    given = last_boxed(text)
    if given is None:
        _, found, given = text.rpartition("answer is")
        if not found:
            return 0.0
    letter = re.search(r"\b[A-Z]\b", given) or re.search(r"[A-Z]", given)
    return float(letter is not None and letter[0] == wanted[0])


REWARDS: dict[str, Reward] = {
    "arithmetic": final_answer,
    "countdown": countdown,
    "gsm8k": final_answer,
    "boxed": boxed,
    "choice": choice,
}


def last_boxed(text: str) -> str | None:
    r"""What the last balanced `\boxed{...}` holds, or None."""
    starts = {match.end() - 1 for match in re.finditer(r"\\boxed\s*\{", text)}
    opened: list[int] = []
    last = (-1, -1)
    for place in (match.start() for match in re.finditer(r"[{}]", text)):
        if text[place] == "{":
            opened.append(place)
        elif opened and (start := opened.pop()) in starts:
            last = max(last, (start, place))
    return None if last[0] < 0 else text[last[0] + 1 : last[1]]


def evaluate(expression: str) -> Fraction | None:
    """The value of an expression of numbers, + - * / and parentheses; None if it is none, or divides by zero."""
    if not expression or len(expression) > _LONGEST_EXPRESSION or not re.fullmatch(r"[0-9+\-*/(). ]+", expression):
        return None
    tokens = [match for match in _TOKENS.findall(expression) if any(match)]
    try:
        value, rest = _sum(tokens)
    except (ArithmeticError, ValueError, IndexError):
        return None
    return None if rest else value


def _sum(tokens: list) -> tuple[Fraction, list]:
    value, tokens = _product(tokens)
    while tokens and tokens[0][1] in ("+", "-"):
        other, rest = _product(tokens[1:])
        value, tokens = (value + other if tokens[0][1] == "+" else value - other), rest
    return value, tokens


def _product(tokens: list) -> tuple[Fraction, list]:
    value, tokens = _factor(tokens)
    while tokens and tokens[0][1] in ("*", "/"):
        other, rest = _factor(tokens[1:])
        value, tokens = (value * other if tokens[0][1] == "*" else value / other), rest
    return value, tokens


def _factor(tokens: list) -> tuple[Fraction, list]:
    number, sign = tokens[0]
    if number:
        return Fraction(number), tokens[1:]
    if sign in ("+", "-"):
        value, rest = _factor(tokens[1:])
        return (value if sign == "+" else -value), rest
    if sign != "(":
        raise ValueError(sign)
    value, rest = _sum(tokens[1:])
    if rest[0][1] != ")":
        raise ValueError(rest[0])
    return value, rest[1:]


def _final(text: str, last_number: bool) -> Fraction | None:
    box = last_boxed(text)
    if box is not None:
        return _number(box)
    _, mark, after = text.rpartition("####")
    if mark:
        return _number(after.strip().split("\n")[0])
    if not last_number:
        return None
    found = _FOUND.findall(_plain(text))
    return _number(found[-1]) if found else None


def _number(text: str) -> Fraction | None:
    """The one number of a short text, exactly; None where there is none, or more than one."""
    if len(text) > 2 * _LONGEST_NUMBER:
        return None
    text = _FRACTION.sub(r"\1/\2", _plain(text))
    text = re.sub(r"\\(text|mathrm|mbox)\{[^{}]*\}|\\[!,;: ]|[$£€%\\{}]", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text).strip()
    text = re.sub(r"^([-+]?)\s+", r"\1", text).rstrip(".").strip()
    match = re.match(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:/\d+)?)(?:\s*[^\d\s+\-*/=.,^()][^\d+*/=^]*)?$", text)
    if match is None or len(match[1]) > _LONGEST_NUMBER:
        return None
    numerator, _, denominator = match[1].partition("/")
    return None if denominator and int(denominator) == 0 else Fraction(numerator) / Fraction(denominator or "1")


def _plain(text: str) -> str:
    return text.replace("\u2212", "-").replace("\u2013", "-").replace("\u00a0", " ")


def _normalised(latex: str) -> str:
    text = _plain(latex)
    text = re.sub(r"\\left|\\right|\\displaystyle|\\[!,;: ]|\\\$|\$|\\%|%|\^\\circ|\^\{\\circ\}", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", "", text).rstrip(".")


def _symbolically_equal(given: str, wanted: str) -> bool:
    verifier = _math_verify()
    if verifier is None or max(len(given), len(wanted)) > _LONGEST_NUMBER:
        return False
    try:
        gold, answer = (verifier.parse(f"${text}$", parsing_timeout=5) for text in (wanted, given))
        return bool(verifier.verify(gold, answer, timeout_seconds=5))
    except Exception:  # a parser of free text, with a time limit: whatever it does not manage is not equal
        return False


def _math_verify():
    """The optional checker, or None; it limits its time by a signal, and so works in a main thread alone."""
    import importlib.util

    if importlib.util.find_spec("math_verify") is None:
        return None
    import math_verify

    return math_verify
