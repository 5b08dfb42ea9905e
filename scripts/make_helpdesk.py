"""Write data/helpdesk/*.jsonl from the knowledge in data/helpdesk/knowledge/, byte for byte from a seed.

    python scripts/make_helpdesk.py            # rewrites the nine files
    python scripts/make_helpdesk.py --check    # fails when a file differs from what the seed gives

The knowledge is a tree: category -> fault family -> four parts that could be at fault. A ticket tells a symptom, a
circumstance that makes one part suspect and proves nothing, one observation for each of three parts that shows it to
work, and the facts of a form. What no observation clears is at fault: that part has one cause and a fix, in two
wordings, that takes one of the facts. So nothing in a ticket names its cause, and no single sentence of it decides.

Every first `new_` entry is kept for the held-out half that tests unseen wordings, every second one for the same half
of dev.jsonl, on which settings are chosen: neither training file nor the pretraining text has them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from twists import RIGHT, WRONG

from qreason.recipe.parse import BASE

HELPDESK = Path(__file__).parent.parent / "data" / "helpdesk"
SEED = 1
SFT_ROWS, PROMPT_ROWS, SEEN_ROWS, NEW_ROWS, DEV_ROWS, PAIR_ROWS = 1500, 3240, 180, 180, 240, 200
LESSON_ROWS = 800
PLAIN_ROWS, RANKED_ROWS = 1200, 4800  # ranked pairs: seven in eight about replies to tickets
SLIPS = 0.5  # of the circumstances of a training ticket; steps quote them as they stand, so quoting is no recalling
SHINGLE, NEAR = 3, 0.5  # words a shingle, Jaccard similarity from which two issues are near duplicates

Facts = dict[str, str]
"""Label -> value, as the form of a ticket states them."""


@dataclass(frozen=True)
class Family:
    """A kind of fault: what people complain about, and the facts their form states."""

    category: str
    id: str
    systems: tuple[str, ...]
    new_systems: tuple[str, ...]
    symptoms: tuple[str, ...]
    new_symptoms: tuple[str, ...]
    facts: Mapping[str, str]
    """Label -> kind."""


@dataclass(frozen=True, eq=False)
class Cause:
    """One of the four parts of a family that could be at fault, with everything that is known about it."""

    family: Family
    part: str
    cause: str
    cleared_by: tuple[str, ...]
    """Observations, each of which shows that the part works."""
    new_cleared_by: tuple[str, ...]
    suspicion: tuple[str, ...]
    """Circumstances that make one think of the part first, and prove nothing."""
    fixes: tuple[str, ...]

    @property
    def category(self) -> str:
        return self.family.category

    @property
    def label(self) -> str:
        """The fact that the fix takes."""
        (label,) = re.findall(r"\{(\w+)\}", self.fixes[0])
        return str(label)

    def written(self, facts: Facts) -> list[str]:
        """The wordings of the fix for a ticket's facts."""
        return [fix.format(**facts) for fix in self.fixes]


def read_knowledge(folder: Path = HELPDESK / "knowledge") -> list[Cause]:
    """All causes, in the order of the files; the four of a family are consecutive."""
    causes = []
    for file in sorted(folder.glob("*.yaml")):
        book: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), BASE)
        for entry in book["families"]:
            lists = {key: tuple(entry[key]) for key in ("systems", "new_systems", "symptoms", "new_symptoms")}
            family = Family(book["category"], entry["id"], facts=entry["facts"], **lists)
            for told in entry["causes"]:
                keys = ("cleared_by", "new_cleared_by", "suspicion", "fixes")
                lists = {key: tuple(told[key]) for key in keys}
                causes.append(Cause(family, told["part"], told["cause"], **lists))
    return causes


def siblings(causes: Iterable[Cause], cause: Cause) -> list[Cause]:
    """The other causes of the same family."""
    return [other for other in causes if other.family is cause.family and other is not cause]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


# --- facts ---------------------------------------------------------------------------------------

SURNAMES = (
    "adams",
    "baker",
    "brandt",
    "costa",
    "diaz",
    "evans",
    "fischer",
    "garcia",
    "haas",
    "keller",
    "lopez",
    "novak",
)
DEPARTMENTS = ("Sales", "HR", "Finance", "Legal", "Design", "Plant", "Support", "Audit")
SITES = ("Bremen", "Cork", "Dresden", "Essen", "Ghent", "Graz", "Leeds", "Lyon", "Metz", "Porto", "Turku", "Zurich")
STARS = ("Altair", "Capella", "Deneb", "Electra", "Fornax", "Hydra", "Izar", "Lyra", "Mira", "Orion", "Rigel", "Vega")
BIRDS = ("Heron", "Robin", "Falcon", "Jay", "Kite", "Lark", "Osprey", "Raven", "Stork", "Wren", "Condor", "Dove")
PORTS = ("1433", "1521", "2049", "3306", "3389", "4500", "5060", "5432", "6379", "7001", "8443", "9090")
KINDS: dict[str, Callable[[random.Random], str]] = {
    "server": lambda rng: rng.choice(STARS),
    "device": lambda rng: f"{rng.choice(('NB', 'PC', 'DEV', 'TAB', 'HW'))}-{rng.choice(BIRDS)}",
    "user": lambda rng: f"{rng.choice('abcdefghjklmnoprst')}.{rng.choice(SURNAMES)}",
    "group": lambda rng: f"{rng.choice(DEPARTMENTS)}-{rng.choice(('RW', 'Users', 'Staff', 'Admins'))}",
    "port": lambda rng: rng.choice(PORTS),
    "size": lambda rng: f"{rng.randint(1, 9)}0 GB",
    "room": lambda rng: f"room {rng.choice('ABCDEFGH')}{rng.randint(1, 9)}",
    "vlan": lambda rng: f"VLAN {rng.randint(1, 9)}0",
    "site": lambda rng: rng.choice(SITES),
    "version": lambda rng: f"{rng.randint(2, 9)}.{rng.randint(0, 9)}",
    "day": lambda rng: rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")),
    "number": lambda rng: str(rng.randint(11, 99)),
    "share": lambda rng: rng.choice(
        ("projects", "invoices", "drawings", "archive", "templates", "scans", "contracts", "photos")
    ),
}
"""Names in place of long numbers: a model of five million parameters confuses the digits of its ticket."""


def draw_facts(family: Family, rng: random.Random) -> Facts:
    return {label: KINDS[kind](rng) for label, kind in family.facts.items()}


def state_facts(facts: Facts, rng: random.Random) -> str:
    """The facts as a line of a form or in a sentence, without a full stop."""
    told = [value if value.lower().startswith(label) else f"{label} {value}" for label, value in facts.items()]
    rng.shuffle(told)
    if rng.random() < 0.3:
        return f"it concerns {', '.join(told[:-1])} and {told[-1]}"
    return ", ".join(told)


# --- tickets -------------------------------------------------------------------------------------

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


def slip(text: str, rng: random.Random) -> str:
    """What a hurried writer makes of a text, its first word apart: a typo, a word lost, doubled or too early."""
    first, *words = text.split()
    place = rng.randrange(len(words) - 1)
    kind = rng.choice(("typo", "lose", "double", "swap"))
    if kind == "typo":
        return f"{first} {typo(' '.join(words), rng)}"
    word = words.pop(place)
    if kind != "lose":
        words[place:place] = [word, word] if kind == "double" else [words.pop(place), word]
    return " ".join([first, *words])


@dataclass(frozen=True)
class Ticket:
    """A ticket, and what was behind it."""

    issue: str
    cause: Cause
    facts: Facts
    told: tuple[tuple[Cause, str], ...]
    """(what it is about, circumstance): three observations that each clear one, and the suspicion, in their order."""
    suspicion: str

    @property
    def seen(self) -> list[tuple[Cause, str]]:
        """(cleared cause, the observation that clears it)."""
        return [one for one in self.told if one[1] != self.suspicion]


def write_ticket(
    cause: Cause,
    others: list[Cause],
    rng: random.Random,
    new: int | None = None,
    suspect: int | None = None,
    slips: float = 0.0,
) -> Ticket:
    """A ticket in the styles people write: plain, terse, chatty, facts first; now and then with a typo.

    `new` is the number of the kept-back wordings to be used in place of the others; `suspect` says of which of
    [cause, *others] the misleading circumstance makes one think; `slips` is the share of circumstances with a slip.
    """
    family = cause.family
    systems, symptoms = (family.systems, family.symptoms) if new is None else (family.new_systems, family.new_symptoms)
    system, symptom = (rng.choice(texts) if new is None else texts[new] for texts in (systems, symptoms))
    symptom = symptom.format(system=system)
    seen = [(o, rng.choice(o.cleared_by) if new is None else o.new_cleared_by[new]) for o in rng.sample(others, 3)]
    suspected = [cause, *others][rng.randrange(4) if suspect is None else suspect]
    suspicion, facts = rng.choice(suspected.suspicion), draw_facts(family, rng)
    if slips:
        suspicion, *slipped = (slip(t, rng) if rng.random() < slips else t for t in (suspicion, *(t for _, t in seen)))
        seen = [(one, text) for (one, _), text in zip(seen, slipped, strict=True)]
    seen.insert(rng.randint(0, 3), (suspected, suspicion))
    told = [text for _, text in seen]
    symptom = typo(symptom, rng) if rng.random() < 0.15 else symptom
    stated = state_facts(facts, rng)
    style = rng.choice(("plain", "plain", "terse", "chatty", "facts first"))
    if style == "terse":
        issue = "; ".join([symptom, *told, stated])
    elif style == "chatty":
        rest = " ".join(map(sentence, [*told, stated]))
        issue = f"{rng.choice(GREETINGS)}{symptom}. {rest}{rng.choice(CLOSINGS)}"
    else:
        parts = [stated, symptom, *told] if style == "facts first" else [symptom, *told, stated]
        issue = " ".join(map(sentence, parts))
    return Ticket(issue, cause, facts, tuple(seen), suspicion)


def write_steps(ticket: Ticket) -> str:
    """What the ticket shows, in its order, then the part that is left and its cause."""
    lines = [
        sentence(f"{text}, so it {'could be' if text == ticket.suspicion else 'is not'} {one.part}")
        for one, text in ticket.told
    ]
    return " ".join([*lines, f"That leaves {ticket.cause.part}.", f"Cause: {ticket.cause.cause}."])


# --- near duplicates -----------------------------------------------------------------------------


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

# --- the files -----------------------------------------------------------------------------------


def pair_row(ticket: Ticket, rng: random.Random) -> Row:
    accepted = [sentence(fix) for fix in ticket.cause.written(ticket.facts)]
    rng.shuffle(accepted)
    return {
        "category": ticket.cause.category,
        "issue": ticket.issue,
        "resolution": accepted[0],
        "accepted": accepted,
    }


class Tickets:
    """Draws tickets that are no near duplicate of a held-out one, none twice."""

    def __init__(
        self,
        causes: list[Cause],
        apart: NearDuplicates,
        rng: random.Random,
        taken: Iterable[str] = (),
        slips: float = 0.0,
    ) -> None:
        self.causes, self.apart, self.rng, self.taken, self.slips = causes, apart, rng, set(taken), slips
        self.others = {cause: siblings(causes, cause) for cause in causes}

    def __call__(self, cause: Cause, suspect: int | None = None) -> Ticket:
        while True:
            ticket = write_ticket(cause, self.others[cause], self.rng, suspect=suspect, slips=self.slips)
            if ticket.issue not in self.taken and ticket.issue not in self.apart:
                self.taken.add(ticket.issue)
                return ticket


def make_heldout(causes: list[Cause], seen_rows: int, new_rows: int, name: str, new: int) -> list[Row]:
    """Rows of both splits, which take turns; `new` is the number of the kept-back wordings."""
    rng = random.Random(f"{name} {SEED}")
    halves = []
    for split, count, number_of in (("seen", seen_rows, None), ("new", new_rows, new)):
        tickets = [
            write_ticket(cause, siblings(causes, cause), rng, number_of)
            for cause in (rng.sample(causes, min(count, len(causes))) * 2)[:count]
        ]
        halves.append([pair_row(ticket, rng) | {"split": split} for ticket in tickets])
    return number(name, [row for both in zip(*halves, strict=True) for row in both])


def make_kept_back(causes: list[Cause]) -> tuple[list[Row], list[Row]]:
    """(held-out rows, development rows): nothing that is trained on is a near duplicate of them."""
    heldout = make_heldout(causes, SEEN_ROWS, NEW_ROWS, "heldout", 0)
    return heldout, make_heldout(causes, DEV_ROWS // 2, DEV_ROWS // 2, "dev", 1)


def make_training(causes: list[Cause], tickets: Tickets) -> tuple[list[Row], list[Row]]:
    """(incidents with steps for SFT, issue/resolution pairs for GRPO), rows shuffled."""
    rng = random.Random(f"training {SEED}")
    incidents = []
    for position in range(SFT_ROWS):
        turn, place = divmod(position, len(causes))
        ticket = tickets(causes[place], suspect=turn % 4)  # so that the steps of each conclusion are all shown
        row = pair_row(ticket, rng)
        incidents.append(
            {"category": row["category"], "issue": row["issue"], "steps": write_steps(ticket)}
            | {"resolution": row["resolution"]}
        )
    pairs = [pair_row(tickets(causes[position % len(causes)]), rng) for position in range(PROMPT_ROWS)]
    rng.shuffle(incidents)
    rng.shuffle(pairs)
    return number("incident", incidents), number("prompt", pairs)


def judged_causes(causes: list[Cause]) -> list[Cause]:
    """The causes of judge_pairs.jsonl: the pretraining text neither compares nor rewords their fixes."""
    return random.Random(f"judged {SEED}").sample(causes, len(causes) // 9)


def unequal(cause: Cause, causes: list[Cause], facts: Facts, rng: random.Random) -> str:
    """A fix that is not the cause's own: of its family, of another one, or its own with another fact."""
    kind = rng.choice(("family", "family", "family", "family", "any", "any", "fact", "fact", "fact", "fact"))
    if kind == "fact":
        return rng.choice(cause.fixes).format(**other_facts(cause, facts, rng))
    other = rng.choice(siblings(causes, cause)) if kind == "family" else rng.choice(causes)
    if other is cause:
        return unequal(cause, causes, facts, rng)
    return rng.choice(other.written(facts if other.family is cause.family else draw_facts(other.family, rng)))


def other_facts(cause: Cause, facts: Facts, rng: random.Random) -> Facts:
    """Facts that differ in what the fix takes."""
    while (drawn := draw_facts(cause.family, rng))[cause.label] == facts[cause.label]:
        pass
    return drawn


def make_pairs(causes: list[Cause], judged: list[Cause], count: int, name: str) -> list[Row]:
    """Labelled (reference, reply) pairs, half of them equal: mostly the other wording, else the same one."""
    rng = random.Random(f"{name}s {SEED}")
    rows: dict[tuple[str, str], int] = {}
    while len(rows) < count:
        cause = judged[len(rows) // 2 % len(judged)]
        facts, equal = draw_facts(cause.family, rng), len(rows) % 2
        first, second = rng.sample(cause.written(facts), 2)
        reply = rng.choice((second, second, first)) if equal else unequal(cause, causes, facts, rng)
        rows.setdefault((first, reply), equal)
    labelled = [{"reference": sentence(a), "reply": sentence(b), "label": label} for (a, b), label in rows.items()]
    rng.shuffle(labelled)
    return number(name, labelled)


def make_twisted(causes: list[Cause], judged: list[Cause], count: int, name: str) -> list[Row]:
    """Labelled (reference, reply) pairs that are hard to tell apart, half of them right."""
    rng = random.Random(f"{name}s {SEED}")
    rows = []
    for position in range(count):
        cause = judged[position // 2 % len(judged)]
        facts = draw_facts(cause.family, rng)
        fixes, other = cause.written(facts), rng.choice(rng.choice(siblings(causes, cause)).written(facts))
        reference = rng.choice(fixes)
        right = position % 2
        reply = rng.choice(RIGHT if right else WRONG)(rng.choice(fixes) if right else reference, other, rng)
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
    fix = rng.choice(cause.written(draw_facts(cause.family, rng)))
    tasks = (
        (f"Write one line that tells the user we have this ticket: {issue}", THANKS.format(category=cause.category)),
        (f"Which team does this ticket go to? {issue}", f"It goes to the {cause.category} team."),
        (f"Tell the user politely to do this: {fix}.", f"Could you please do this for us: {fix}? Thank you."),
        (f"Put this into one sentence for the runbook: {cause.part}; {cause.cause}.", FAULT.format(cause=cause)),
    )
    prompt, reply = rng.choice(tasks)
    return {"category": cause.category, "prompt": prompt, "reference": reply}


FAULT = "When it is {cause.part}: {cause.cause}."
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


def make_plain(causes: list[Cause], tickets: Tickets) -> list[Row]:
    rng = random.Random(f"plain {SEED}")
    chosen = [causes[place % len(causes)] for place in range(PLAIN_ROWS)]
    rows = [plain_row(cause, tickets(cause).issue, rng) for cause in chosen]
    rng.shuffle(rows)
    return number("plain", rows)


def ranked_row(about: str, cause: Cause, other: Cause, tickets: Tickets, rng: random.Random) -> Row:
    """Two replies, the better one first: `helpfulness` and `harmlessness` to a plain task, the others to a ticket."""
    ticket = tickets(cause)
    row = plain_row(cause, ticket.issue, rng)
    prompt, chosen = row["prompt"], row["reference"]
    if about == "helpfulness":
        rejected = rng.choice((rng.choice(EMPTY), plain_row(other, ticket.issue, rng)["reference"]))
    elif about == "harmlessness":
        bad = rng.choice(RUDE + UNSAFE)
        rejected = rng.choice((f"{chosen} {bad}", f"{bad} {chosen}"))
    else:
        prompt = ticket.issue
        chosen, rejected = (write_reply(one, rng) for one in (ticket, tickets(other)))
    return {"about": about, "category": cause.category, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_reply(ticket: Ticket, rng: random.Random) -> str:
    fix = sentence(rng.choice(ticket.cause.written(ticket.facts)))
    return f"<reasoning>{write_steps(ticket)}</reasoning>\n<answer>{fix}</answer>"


def make_ranked(causes: list[Cause], tickets: Tickets) -> list[Row]:
    """Ranked pairs for reward models; the worse reply is one to `other`."""
    rng = random.Random(f"ranked {SEED}")
    kinds = ("helpfulness", "harmlessness", *["relevance", "resolution"] * 7)
    rows: list[Row] = []
    while len(rows) < RANKED_ROWS:
        cause, about = rng.choice(causes), kinds[len(rows) % len(kinds)]
        near = [one for one in causes if one.category == cause.category and one is not cause]
        others = [one for one in causes if one.category != cause.category] if about == "relevance" else near
        row = ranked_row(about, cause, rng.choice(others), tickets, rng)
        if row["chosen"] != row["rejected"]:
            rows.append(row)
    rng.shuffle(rows)
    return number("ranked", rows)


def number(prefix: str, rows: list[Row]) -> list[Row]:
    return [{"id": f"{prefix}-{index:04d}"} | row for index, row in enumerate(rows, 1)]


def make_all() -> dict[str, list[Row]]:
    """File name -> rows."""
    causes = read_knowledge()
    heldout, dev = make_kept_back(causes)
    apart = NearDuplicates(row["issue"] for row in heldout + dev)
    incidents, pairs = make_training(causes, Tickets(causes, apart, random.Random(f"tickets {SEED}"), slips=SLIPS))
    judged = judged_causes(causes)
    others = [cause for cause in causes if cause not in judged]
    taken = {row["issue"] for row in incidents + pairs}
    tickets = Tickets(causes, apart, random.Random(f"further {SEED}"), taken, SLIPS)
    return {
        "sft.jsonl": incidents,
        "prompts.jsonl": pairs,
        "heldout.jsonl": heldout,
        "dev.jsonl": dev,
        "judge_pairs.jsonl": make_pairs(causes, judged, PAIR_ROWS, "pair"),
        "judge_hard.jsonl": number("hard", make_twisted(causes, judged, PAIR_ROWS, "hard")),
        "judge_training.jsonl": make_lessons(causes, others),
        "plain.jsonl": make_plain(causes, tickets),
        "pairs.jsonl": make_ranked(causes, tickets),
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
