"""The final answer of a worked solution: found, normalised, compared."""

from __future__ import annotations

import re
from dataclasses import dataclass

from d3llm_ray.mathematics import is_sentence, same_mathematics

_DIGITS = r"-?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?"
_MARK = re.compile(r"####\s*(-?[.,]?\d[^\n]*|[^\n]+(?=\s*\Z))")  # a number, or the last line: else a heading
# A number: at the start of a marked line, whatever follows but an operator; in a box alone; as a reference with a unit.
_MARKED = re.compile(
    r"(?:\\?[$€£])?\s*(?P<number>-?\.?\d[\d,.]*+)(?!\s*(?:[-+*:(]\s*(?:[\d\\]|[B-Zb-z]\b)|[/^{_>=×÷√]|<(?!\|)|\\[A-Za-z]))"
)
_BOXED = re.compile(rf"(?:\\?\$)?\s*(?P<number>{_DIGITS})\s*\.?$")
_QUANTITY = re.compile(
    rf"(?:\\?[$€£])?\s*(?P<number>{_DIGITS})\s*%?\.?"
    r"(?:\s+(?!(?:pi|sqrt|sin|cos|tan|log|ln)\b)[A-Za-z]{2,}[A-Za-z .'-]*)?$"
)
# Any number, with what makes it a part of an expression.
_NUMBER = re.compile(
    r"(?P<before>\\(?:[dt]?frac\s*(?:\{[^{}]*\}|\d)|sqrt)\s*\{?|[/^_]\s*\{?)?(?P<number>-?\d[\d,]*(?:\.\d+)?)"
    r"(?=(?P<after>\s*(?:\\(?:pi|sqrt|cdot|times|[dt]?frac)|[/^]))?)"
)


@dataclass(frozen=True)
class FinalAnswer:
    """Judges a solution by its final answer: numbers digit by digit, all else as mathematics."""

    def extract(self, text: str) -> str | None:
        """The final answer, normalised: after the last `####` (GSM8K), else in the last `\\boxed{}` (MATH), else the
        last number; None where there is none."""
        number, answer = _final(text)
        return normalise(answer) if number is None and len(answer) < len(text.strip()) else number

    def is_correct(self, text: str, reference: str) -> bool:
        """Whether a solution ends in the reference answer."""
        expected, known = _final(reference, whole=True)
        answer, given = _final(text)
        if expected is not None and (answer is not None or not re.search(r"[\d\\]", given)):
            return answer == expected
        return normalise(given) == normalise(known) or same_mathematics(known, given)


def _final(text: str, *, whole: bool = False) -> tuple[str | None, str]:
    """The final answer as a number, normalised, where it is one, and as it stands; the text where nothing marks it.

    `whole`: a text that marks nothing is the answer, and a number if it is a quantity, or a sentence with one.
    """
    text = text.replace("−", "-")
    if marked := _MARK.findall(text):
        found, answer = _MARKED.match(marked[-1]), marked[-1]
    elif (boxed := last_boxed(text)) is not None:
        found, answer = _BOXED.match(boxed.strip()), boxed
    elif whole and not is_sentence(text):
        found, answer = _QUANTITY.match(text.strip()), text
    else:
        *_, found = (None, *_NUMBER.finditer(text))
        found, answer = None if found is None or found["before"] or found["after"] else found, text
    return None if found is None else normalise(found["number"].replace(",", "")), answer.strip()


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` with balanced braces; None when there is none or it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for index in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : index]
    return None


def normalise(answer: str) -> str:
    """Answers compare without case, spaces, thousands separators, a final stop, a decimal's last zeros, text marks."""
    answer = re.sub(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r"\1", answer.lower())
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|\s|\\?\$", "", answer).rstrip(".")
    return answer.rstrip("0").rstrip(".") if re.search(r"\.\d+$", answer) else answer
