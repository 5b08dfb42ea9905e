"""Words and numbers of a text in any script: what two wordings share, and which number an answer gives."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from math import isfinite

UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
"""A character of Thai, Lao, Burmese, Khmer, Japanese or Chinese, which have no spaces between words: it is one."""
SIGNS = str.maketrans("−‐‑⁄∕÷×·⋅∙٫٬’‘", "---///****.,''")
SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
VULGAR = re.compile("[¼-¾⅐-⅞↉]")
LATEX = (
    (re.compile(r"\\boxed\s*\{(.*)\}", re.DOTALL), r"\1"),
    (re.compile(r"(\d?)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1 \2/\3"),
    (re.compile(r"([-+])\s+(?=\d+/)"), r"\1"),
    (re.compile(r"\{,\}|\\,"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\b(?:minus|negative)\s+(?=[$€£¥₹]?[\d.])", re.I), "-"),
)
"""What else stands for a number or a sign."""
INTEGER = (
    r"(?:(?P<dotted>\d{1,3}(?:\.\d{3})+(?=,\d)|\d{1,3}(?:\.\d{3}){2,}(?![\d.]))"
    r"|[1-9]\d{0,2}(?P<mark>[,' ])\d{3}(?:(?P=mark)\d{3})*(?!\d)|\d+)"
)
DECIMALS = r"(?P<decimals>\.\d+|,\d{1,2}(?!\d|,\d)|,\d{4,}(?!,\d)|(?<=\b0),\d+)?"
EXPONENT = r"(?:e(?P<exponent>[-+]?\d+)|\s?[x*]\s?10\^\{?(?P<power>[-+]?\d+)\}?)?"
NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:[$€£¥₹]\s?)?(?P<inner>[-+]?)"
    r"(?:(?:(?P<whole>\d+) )?(?P<top>\d+)\s?/\s?(?P<bottom>\d+)(?![\d/])"
    rf"|(?P<integer>{INTEGER}){DECIMALS}{EXPONENT}|(?P<point>\.\d+))",
    re.I,
)
"""`-$1,234.50`, `70 000`, `2,5`, `1.234,5`, `3e8`, `3 x 10^8`, `2 1/2`."""
SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "dozen": 12.0}
SCALE = re.compile(rf"\s?({'|'.join(SCALES)})s?\b", re.I)
IN_WORD = re.compile(r"(?:[^\W\d_]\^?|_)$")
OPERAND_AFTER = re.compile(r"(?:[\d)\]}][.,:']?|[/^*±√]|\\[a-z]+\s*\{?|[)\]}]\{|[\d)\]}]\s*[-+*/x^]\s*)$", re.I)
OPERAND_BEFORE = re.compile(r"\s*(?:\^|√|π|pi\b|\\(?!%|text|mathrm|\s))|[xyzni]\b|[.,:]\d")
NEAR = 40
"""Characters before a number that decide what it is."""
UNIT = re.compile(r"\s*(?:%|(?:[^\W\d_]|[°€$£¥₹²³/]|\^-?\d)*)")


def unify(text: str) -> str:
    """A text with one way to write each letter, digit, sign, space and fraction; ASCII stays as it is."""
    if text.isascii():
        return text
    text = SUPERSCRIPT.sub(lambda found: f"^{found[0]}", text)
    text = VULGAR.sub(lambda found: f" {found[0]}", text)
    text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = re.sub("–(?=[$€£¥₹]?[0-9.])", "-", text)
    return re.sub(r"[^\S\n]", " ", re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text))


def words(text: str) -> list[str]:
    """The words of a text without case: letters, marks and digits; a character of a script without spaces is one."""
    if text.isascii():
        return re.findall(r"\w+", text.lower())
    text = UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold())
    return "".join(
        one if one.isalnum() or one == "_" or unicodedata.category(one)[0] == "M" else " " for one in text
    ).split()


def count_words(text: str) -> int:
    """The number of words between spaces; a character of a script without spaces is one."""
    return len((text if text.isascii() else UNSPACED.sub(r" \1 ", text)).split())


def value_of(found: re.Match[str]) -> float:
    """The value of a NUMBER; not finite where there is none."""
    if found["top"]:
        bottom = float(found["bottom"])
        value = float(found["whole"] or 0) + float(found["top"]) / bottom if bottom else float("nan")
    elif found["point"]:
        value = float(found["point"])
    else:
        decimals = "." + found["decimals"][1:] if found["decimals"] else ""
        exponent = found["exponent"] or found["power"] or "0"
        value = float(f"{re.sub('[^0-9]', '', found['integer'])}{decimals}e{exponent}")
    if scale := SCALE.match(found.string, found.end()):
        value *= SCALES[scale[1].lower()]
    return -value if (found["sign"] + found["inner"]).count("-") == 1 else value


def numbers(text: str) -> Iterator[tuple[float, bool]]:
    """(value, whether it stands for itself) of each number that is no part of a word; an operand does not."""
    text = unify(text)
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    for found in NUMBER.finditer(text):
        before, value = text[max(0, found.start() - NEAR) : found.start()], value_of(found)
        if IN_WORD.search(before):
            if not found["sign"] or before.endswith("^"):
                continue
            value, alone = abs(value), len(before) > 1 and before[-2].isalpha()  # a hyphen; after one letter a minus
        else:
            joined = bool(found["sign"]) and re.search(r"[\d)\]}]\s*$", before) is not None
            alone = not joined and OPERAND_AFTER.search(before) is None
            value = abs(value) if joined else value
        yield value, alone and isfinite(value) and OPERAND_BEFORE.match(text, found.end()) is None


def last_number(text: str) -> float | None:
    """The last number of a text; None where it is part of an expression: `20-5` is neither 5 nor -5."""
    found = list(numbers(text))
    return found[-1][0] if found and found[-1][1] else None


def read_number(text: str) -> float | None:
    """The number a text consists of, with at most a currency sign, a percent sign or one unit word; else None."""
    found = list(numbers(text))
    if len(found) != 1 or not found[0][1]:
        return None
    bare = unify(text).strip()
    for pattern, plain in LATEX:
        bare = pattern.sub(plain, bare).strip()
    match = NUMBER.match(bare)
    if match is None or not UNIT.fullmatch(bare, match.end()):
        return None
    return found[0][0]
