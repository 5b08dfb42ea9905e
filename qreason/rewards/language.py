"""The reward for staying in one language, judged offline by a naive Bayes detector (py3langid)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Annotated, Any

from pydantic import AfterValidator

from qreason.rewards.tags import TAG
from qreason.types import Example, Reply

SCRIPTS = {
    "ARABIC": "ar ary arz fa ps sdh ug ur uzs",
    "ARMENIAN": "hy",
    "BENGALI": "as bn",
    "CJK IDEOGRAPHIC": "wuu yue zh",
    "CJK IDEOGRAPHIC HIRAGANA KATAKANA": "ja",
    "CYRILLIC": "ba be bg kk ky mk mn ru tg tt uk",
    "CYRILLIC LATIN": "crh sr uz",
    "DEVANAGARI": "gom hi mr ne sa",
    "ETHIOPIC": "am",
    "GEORGIAN": "ka",
    "GREEK": "el grc",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "HANGUL": "ko",
    "HEBREW": "hbo he",
    "KANNADA": "kn",
    "KHMER": "km",
    "LAO": "lo",
    "MALAYALAM": "ml",
    "MYANMAR": "my",
    "ORIYA": "or",
    "SINHALA": "si",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "TIBETAN": "dz",
}
"""Scripts, as Unicode names their letters -> the languages written in them; all others are written in LATIN."""
SCRIPTS_OF = {language: names for names, languages in SCRIPTS.items() for language in languages.split()}
UNSPACED = {"CJK", "HIRAGANA", "IDEOGRAPHIC", "KATAKANA", "KHMER", "LAO", "MYANMAR", "THAI", "TIBETAN"}
"""Scripts without spaces between words: every character counts as a word."""
SEGMENT_WORDS = 5
"""The shortest text that is classified alone."""
MARGIN_NATS = 5.0
"""The lead in log-likelihood by which another language makes a segment foreign."""
CLAUSE = re.compile(r"(?<=[.!?;:,])\s+|\n+|(?<=[。、！？；，।؟،؛])")
PUNCTUATION = "".join(chr(code) for code in range(0x3040) if unicodedata.category(chr(code))[0] in "PS")
INVISIBLE = re.compile("[\u00ad\u0300-\u036f\u200b-\u200f\ufeff]")
"""Soft hyphens, joiners and separate accents."""


@cache
def detector() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def check_language(language: str) -> str:
    """The code unchanged. Raises ValueError for a language that the detector does not know."""
    known = sorted(set(detector().labels) - {"zxx"})  # zxx: not a language
    if language not in known:
        raise ValueError(f"unknown language '{language}'; known are {', '.join(known)}")
    return language


Language = Annotated[str, AfterValidator(check_language)]
"""A language code, checked when the recipe is read."""


def scripts_of(language: str) -> set[str]:
    return set(SCRIPTS_OF.get(language, "LATIN").split())


@cache
def script(character: str) -> str:
    """The script of a letter or vowel sign: the first word of its Unicode name; empty for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    return re.split("[ -]", unicodedata.name(character, ""))[0]


def read_words(token: str) -> Iterator[tuple[str, str]]:
    """(script, word) pairs of a token; single letters, numbers, acronyms and identifiers do not count."""
    word = token.strip(PUNCTUATION)
    scripts = set(map(script, re.sub("['’‐-]", "", word)))
    if scripts <= {"LATIN", ""}:
        if "" not in scripts and word[1:].islower():
            yield "LATIN", word
        return
    for name, run in groupby(word, script):
        part = "".join(run)
        if name in UNSPACED:
            yield from ((name, character) for character in part)
        elif name == "LATIN":
            yield from read_words(part)
        elif name and len(part) > 1:
            yield name, part


def is_in(words: Sequence[str], language: str) -> bool:
    """Whether no other language is clearly more likely for a segment."""
    text = ("" if scripts_of(language) & UNSPACED else " ").join(words)
    if detector().classify(text)[0] == language:
        return True
    ranked = detector().rank(text)
    return bool(ranked[0][1] - dict(ranked)[language] <= MARGIN_NATS)


def language_share(text: str, language: str) -> float | None:
    """The share of words that are in a language; None for a text without words."""
    scripts = scripts_of(language)
    segments: list[list[str]] = [[]]
    words_of_other_scripts = 0
    # Split first: NFKC turns the full-width comma, which ends a clause without a space, into an ASCII one.
    for piece in CLAUSE.split(TAG.sub("\n", text)):
        clause = INVISIBLE.sub("", unicodedata.normalize("NFKC", piece))
        tokens = clause.split()
        if len(tokens) >= SEGMENT_WORDS and clause.isupper():  # all capitals, not a list of acronyms
            tokens = clause.lower().split()
        if len(segments[-1]) >= SEGMENT_WORDS:
            segments.append([])
        words = [pair for token in tokens for pair in read_words(token)]
        segments[-1] += [word for name, word in words if name in scripts]
        words_of_other_scripts += sum(name not in scripts for name, _ in words)
    if len(segments) > 1 and len(segments[-1]) < SEGMENT_WORDS:
        segments[-2:] = [segments[-2] + segments[-1]]
    total = sum(map(len, segments)) + words_of_other_scripts
    inside = sum(len(segment) for segment in segments if segment and is_in(segment, language))
    return inside / total if total else None


def language_consistency(
    replies: Sequence[Reply], examples: Sequence[Example], *, language: Language = "en"
) -> list[float | None]:
    """0..1: share of the words of a reply that are in the language (DeepSeek-R1, arXiv 2501.12948, section 2.3.2).

    Words of another script are not. The others are classified in segments of at least five words; a segment is foreign
    if another language is clearly more likely. None for a reply without words, such as a lone number.
    Raises ValueError for an unknown language code (ISO 639-1, where there is one).
    """
    check_language(language)
    return [language_share(reply.text, language) for reply in replies]
