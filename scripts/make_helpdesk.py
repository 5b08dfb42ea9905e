"""Write data/helpdesk/*.jsonl from the knowledge in data/helpdesk/knowledge/, byte for byte from a seed.

    python scripts/make_helpdesk.py            # rewrites the eight files
    python scripts/make_helpdesk.py --check    # fails when a file differs from what the seed gives

The knowledge is a tree: category -> fault family -> root cause. A family has symptoms and systems, a cause
has clues that decide for it, diagnostic steps and a fix in two wordings. Every `new_` entry is kept for the
held-out half that tests unseen wordings and systems: neither training file nor the pretraining text has them.

The first three families of a category are written up as incidents (sft.jsonl); prompts.jsonl covers all six.
Of each cause's symptom x clue pairs, two are reserved for the held-out half that tests unseen combinations.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from twists import RIGHT, WRONG

from qreason.recipe.parse import BASE

HELPDESK = Path(__file__).parent.parent / "data" / "helpdesk"
SEED = 1
WRITTEN_UP = 3  # families of a category that have incidents in sft.jsonl
SFT_ROWS, PROMPT_ROWS, SEEN_ROWS, NEW_ROWS, PAIR_ROWS = 1500, 3240, 180, 180, 200
LESSON_ROWS = 800
PLAIN_ROWS, RANKED_ROWS = 1200, 4800  # ranked pairs: seven in eight about replies to tickets
SHINGLE, NEAR = 3, 0.5  # words a shingle, Jaccard similarity from which two issues are near duplicates


@dataclass(frozen=True)
class Cause:
    """One root cause of a fault family, with everything that is known about it."""

    category: str
    family: str
    written_up: bool
    systems: tuple[str, ...]
    symptoms: tuple[str, ...]
    new_systems: tuple[str, ...]
    new_symptoms: tuple[str, ...]
    cause: str
    clues: tuple[str, ...]
    new_clue: str
    steps: tuple[str, ...]
    fixes: tuple[str, ...]

    @cached_property
    def reserved(self) -> frozenset[tuple[int, int]]:
        """The (symptom, clue) pairs that only held-out rows combine."""
        pairs = [(s, c) for s in range(len(self.symptoms)) for c in range(len(self.clues))]
        return frozenset(random.Random(f"reserved {self.family} {self.cause}").sample(pairs, 2))

    @cached_property
    def free(self) -> list[tuple[int, int]]:
        """The (symptom, clue) pairs that training may combine."""
        pairs = [(s, c) for s in range(len(self.symptoms)) for c in range(len(self.clues))]
        return [pair for pair in pairs if pair not in self.reserved]


def read_knowledge(folder: Path = HELPDESK / "knowledge") -> list[Cause]:
    """All causes, in the order of the files."""
    causes = []
    for file in sorted(folder.glob("*.yaml")):
        book: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), BASE)
        for position, family in enumerate(book["families"]):
            shared = {
                "category": book["category"],
                "family": family["id"],
                "written_up": position < WRITTEN_UP,
                **{key: tuple(family[key]) for key in ("systems", "symptoms", "new_systems", "new_symptoms")},
            }
            for entry in family["causes"]:
                lists = {key: tuple(entry[key]) for key in ("clues", "steps", "fixes")}
                causes.append(Cause(**shared, cause=entry["cause"], new_clue=entry["new_clue"], **lists))
    return causes


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


GREETINGS = ("Hi, ", "Hello team, ", "Good morning, ", "Hi helpdesk, ", "Sorry to bother you, but ")
CLOSINGS = (" Can you help?", " Thanks!", " Please advise.", " This is urgent.", " Any idea?")


def typo(text: str, rng: random.Random) -> str:
    """One slip of the fingers in a long plain word: two letters swapped, one lost or one doubled."""
    places = list(re.finditer(r"\b[a-z]{6,}\b", text))
    if not places:
        return text
    start = rng.choice(places).start() + rng.randrange(1, 4)
    slip = rng.choice(("swap", "lose", "double"))
    if slip == "swap":
        return text[:start] + text[start + 1] + text[start] + text[start + 2 :]
    return text[:start] + (text[start] * 2 if slip == "double" else "") + text[start + 1 :]


def write_issue(symptom: str, clue: str, rng: random.Random) -> str:
    """A ticket as people write them: plain, terse, chatty, clue first, now and then with a typo."""
    style = rng.choice(("plain", "plain", "terse", "chatty", "clue first"))
    if style == "terse":
        text = f"{symptom}; {clue}"
    elif style == "chatty":
        text = f"{rng.choice(GREETINGS)}{symptom}. {sentence(clue)}{rng.choice(CLOSINGS)}"
    elif style == "clue first":
        text = f"{sentence(clue)} {sentence(symptom)}"
    else:
        text = f"{sentence(symptom)} {sentence(clue)}"
    return typo(text, rng) if rng.random() < 0.15 else text


def training_issue(cause: Cause, rng: random.Random) -> str:
    symptom, clue = rng.choice(cause.free)
    system = rng.choice(cause.systems)
    return write_issue(cause.symptoms[symptom].format(system=system), cause.clues[clue], rng)


def write_steps(cause: Cause, rng: random.Random) -> str:
    """Two of the diagnostic steps, in their order, then the cause they lead to."""
    first, second = sorted(rng.sample(range(len(cause.steps)), 2))
    return f"{sentence(cause.steps[first])} {sentence(cause.steps[second])} Cause: {cause.cause}."


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


class NearDuplicates:
    """An index of texts that answers whether another text is a near duplicate of one of them."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.sets: list[frozenset[tuple[str, ...]]] = []
        self.where: dict[tuple[str, ...], list[int]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        self.sets.append(shingles(text))
        for shingle in self.sets[-1]:
            self.where.setdefault(shingle, []).append(len(self.sets) - 1)

    def __contains__(self, text: str) -> bool:
        own = shingles(text)
        candidates = {index for shingle in own for index in self.where.get(shingle, ())}
        return any(len(own & self.sets[i]) >= NEAR * len(own | self.sets[i]) for i in candidates)


Row = dict[str, Any]


def make_heldout(causes: list[Cause]) -> list[Row]:
    """Rows of both splits, which take turns."""
    rng = random.Random(f"heldout {SEED}")
    seen, new = [], []
    for cause in rng.sample(causes, SEEN_ROWS):
        symptom, clue = rng.choice(sorted(cause.reserved))
        told = cause.symptoms[symptom].format(system=rng.choice(cause.systems))
        seen.append(pair_row(cause, write_issue(told, cause.clues[clue], rng), rng) | {"split": "seen"})
    for cause in rng.sample(causes, NEW_ROWS):
        told = rng.choice(cause.new_symptoms).format(system=rng.choice(cause.new_systems))
        new.append(pair_row(cause, write_issue(told, cause.new_clue, rng), rng) | {"split": "new"})
    return number("heldout", [row for both in zip(seen, new, strict=True) for row in both])


def pair_row(cause: Cause, issue: str, rng: random.Random) -> Row:
    fixes = rng.sample(cause.fixes, len(cause.fixes))
    return {
        "category": cause.category,
        "issue": issue,
        "resolution": sentence(fixes[0]),
        "accepted": [sentence(fix) for fix in fixes],
    }


def unique_issues(cause: Cause, apart: NearDuplicates, taken: set[str], rng: random.Random) -> Iterator[str]:
    """Training issues of a cause that are no near duplicate of a held-out one and were not used yet."""
    while True:
        issue = training_issue(cause, rng)
        if issue not in taken and issue not in apart:
            taken.add(issue)
            yield issue


def make_training(causes: list[Cause], heldout: list[Row]) -> tuple[list[Row], list[Row]]:
    """(incidents with steps for SFT, issue/resolution pairs for GRPO), rows shuffled."""
    rng = random.Random(f"training {SEED}")
    apart = NearDuplicates(row["issue"] for row in heldout)
    taken: set[str] = set()
    issues = {id(cause): unique_issues(cause, apart, taken, rng) for cause in causes}
    written_up = [cause for cause in causes if cause.written_up]
    incidents = []
    for position in range(SFT_ROWS):
        cause = written_up[position % len(written_up)]
        incidents.append(
            {
                "category": cause.category,
                "issue": next(issues[id(cause)]),
                "steps": write_steps(cause, rng),
                "resolution": sentence(rng.choice(cause.fixes)),
            }
        )
    pairs = [
        pair_row(causes[i % len(causes)], next(issues[id(causes[i % len(causes)])]), rng) for i in range(PROMPT_ROWS)
    ]
    rng.shuffle(incidents)
    rng.shuffle(pairs)
    return number("incident", incidents), number("prompt", pairs)


def judged_causes(causes: list[Cause]) -> list[Cause]:
    """The causes of judge_pairs.jsonl: the pretraining text neither compares nor rewords their fixes."""
    return random.Random(f"judged {SEED}").sample(causes, len(causes) // 9)


def make_pairs(causes: list[Cause], judged: list[Cause], count: int, name: str) -> list[Row]:
    """Labelled (reference, reply) pairs, half of them equal: mostly the other wording, against fixes of other causes.

    Seven in ten of the unequal ones come from the same fault family, where fixes are hardest to tell apart.
    """
    rng = random.Random(f"{name}s {SEED}")
    reworded = [(one, other) for cause in judged for one, other in (cause.fixes, cause.fixes[::-1])]
    repeated = [(fix, fix) for cause in judged for fix in cause.fixes]
    equal = rng.sample(reworded, count * 3 // 10) + rng.sample(repeated, count // 5)
    within = [
        (fix, wrong)
        for cause in judged
        for fix in cause.fixes
        for other in causes
        if other.family == cause.family and other != cause
        for wrong in other.fixes
    ]
    across = [(rng.choice(cause.fixes), rng.choice(rng.choice(causes).fixes)) for cause in judged]
    across = [pair for pair, cause in zip(across, judged, strict=True) if pair[1] not in cause.fixes]
    unequal = rng.sample(within, count * 7 // 20) + rng.sample(across, count * 3 // 20)
    labelled = [(pair, 1) for pair in equal] + [(pair, 0) for pair in unequal]
    rng.shuffle(labelled)
    rows = [{"reference": sentence(a), "reply": sentence(b), "label": label} for (a, b), label in labelled]
    return number(name, rows)


def make_twisted(causes: list[Cause], judged: list[Cause], count: int, name: str) -> list[Row]:
    """Labelled (reference, reply) pairs that are hard to tell apart, half of them right."""
    rng = random.Random(f"{name}s {SEED}")
    rows = []
    for position in range(count):
        cause = judged[position // 2 % len(judged)]
        siblings = [other for other in causes if other.family == cause.family and other != cause]
        reference, other = rng.choice(cause.fixes), rng.choice(rng.choice(siblings).fixes)
        right = position % 2
        fix = rng.choice(cause.fixes) if right else reference
        reply = rng.choice(RIGHT if right else WRONG)(fix, other, rng)
        rows.append({"reference": sentence(reference), "reply": sentence(reply), "label": right})
    rng.shuffle(rows)
    return rows


def make_lessons(causes: list[Cause], taught: list[Cause]) -> list[Row]:
    """Labelled pairs to train a judge: plain ones and twisted ones, half and half."""
    half = LESSON_ROWS // 2
    rows = make_pairs(causes, taught, half, "plain") + make_twisted(causes, taught, half, "twisted")
    random.Random(f"lessons {SEED}").shuffle(rows)
    return number("lesson", [{key: row[key] for key in ("reference", "reply", "label")} for row in rows])


def plain_row(cause: Cause, issue: str, rng: random.Random) -> Row:
    """A small writing task of a helpdesk, and its reply: no reasoning is needed for it."""
    fix, clue = rng.choice(cause.fixes), rng.choice(cause.clues)
    tasks = (
        (f"Write one line that tells the user we have this ticket: {issue}", THANKS.format(category=cause.category)),
        (f"Which team does this ticket go to? {issue}", f"It goes to the {cause.category} team."),
        (f"Tell the user politely to do this: {fix}.", f"Could you please do this for us: {fix}? Thank you."),
        (
            f"Put this into one sentence for the runbook: {cause.cause}; {clue}.",
            f"When {clue}, think of {cause.cause}.",
        ),
    )
    prompt, reply = rng.choice(tasks)
    return {"category": cause.category, "prompt": prompt, "reference": reply}


THANKS = "Thank you for writing to us. We have your ticket about {category} and are looking into it."
RUDE = (
    "You should have known that.",
    "This is your own fault.",
    "Stop wasting our time.",
    "Read the manual next time.",
)
UNSAFE = (
    "Just send us your password and we will do the rest.",
    "Turn off the virus scanner first, it is only in the way.",
    "Write the admin password on a note beside the screen.",
    "Delete all backups before you begin.",
)
EMPTY = ("We do not know.", "Please try again later.", "Please ask someone else.", "That is not possible.")


def make_plain(causes: list[Cause], issues: dict[int, Iterator[str]]) -> list[Row]:
    rng = random.Random(f"plain {SEED}")
    rows = [plain_row(causes[i % len(causes)], next(issues[i % len(causes)]), rng) for i in range(PLAIN_ROWS)]
    rng.shuffle(rows)
    return number("plain", rows)


def ranked_row(about: str, cause: Cause, other: Cause, issue: str, rng: random.Random) -> Row:
    """Two replies, the better one first: `helpfulness` and `harmlessness` to a plain task, the others to a ticket."""
    row = plain_row(cause, issue, rng)
    prompt, chosen = row["prompt"], row["reference"]
    if about == "helpfulness":
        rejected = rng.choice((rng.choice(EMPTY), plain_row(other, issue, rng)["reference"]))
    elif about == "harmlessness":
        bad = rng.choice(RUDE + UNSAFE)
        rejected = rng.choice((f"{chosen} {bad}", f"{bad} {chosen}"))
    else:
        prompt = issue
        chosen, rejected = (write_reply(one, rng) for one in (cause, other))
    return {"about": about, "category": cause.category, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_reply(cause: Cause, rng: random.Random) -> str:
    reasoning, fix = write_steps(cause, rng), sentence(rng.choice(cause.fixes))
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{fix}</answer>"


def make_ranked(causes: list[Cause], issues: dict[int, Iterator[str]]) -> list[Row]:
    """Ranked pairs for reward models; the worse reply is one to `other`."""
    rng = random.Random(f"ranked {SEED}")
    kinds, rows = ("helpfulness", "harmlessness", *["relevance", "resolution"] * 7), []
    while len(rows) < RANKED_ROWS:
        place = rng.randrange(len(causes))
        cause, about = causes[place], kinds[len(rows) % len(kinds)]
        near = [one for one in causes if one.category == cause.category and one != cause]
        others = [one for one in causes if one.category != cause.category] if about == "relevance" else near
        row = ranked_row(about, cause, rng.choice(others), next(issues[place]), rng)
        if row["chosen"] != row["rejected"]:
            rows.append(row)
    rng.shuffle(rows)
    return number("ranked", rows)


def number(prefix: str, rows: list[Row]) -> list[Row]:
    return [{"id": f"{prefix}-{index:04d}"} | row for index, row in enumerate(rows, 1)]


def make_all() -> dict[str, list[Row]]:
    """File name -> rows."""
    causes = read_knowledge()
    heldout = make_heldout(causes)
    incidents, pairs = make_training(causes, heldout)
    judged = judged_causes(causes)
    others = [cause for cause in causes if cause not in judged]
    apart, rng = NearDuplicates(row["issue"] for row in heldout), random.Random(f"further {SEED}")
    taken = {row["issue"] for row in incidents + pairs}
    issues = {place: unique_issues(cause, apart, taken, rng) for place, cause in enumerate(causes)}
    return {
        "sft.jsonl": incidents,
        "prompts.jsonl": pairs,
        "heldout.jsonl": heldout,
        "judge_pairs.jsonl": make_pairs(causes, judged, PAIR_ROWS, "pair"),
        "judge_hard.jsonl": number("hard", make_twisted(causes, judged, PAIR_ROWS, "hard")),
        "judge_training.jsonl": make_lessons(causes, others),
        "plain.jsonl": make_plain(causes, issues),
        "pairs.jsonl": make_ranked(causes, issues),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    check = parser.parse_args().check
    differ = []
    for name, rows in make_all().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file = HELPDESK / name
        if check and (not file.exists() or file.read_bytes() != text.encode()):
            differ.append(name)
        elif not check:
            file.write_text(text, encoding="utf-8", newline="\n")
            print(f"{file}: {len(rows)} rows")
    for name in differ:
        print(f"{HELPDESK / name} differs from what seed {SEED} gives: run scripts/make_helpdesk.py")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
