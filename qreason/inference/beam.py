"""Step-wise beam search: several beginnings of a reply grow sentence by sentence, and the best ones go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qreason.inference.generate import Drawing, LocalGenerator
from qreason.inference.ranking import Ranking
from qreason.machine.rows import Rows
from qreason.recipe.settings import Beam
from qreason.types import Example, Messages, Reply, Sampling

STEP_ENDS = (".", "!", "?", "\n")
"""What a step of reasoning ends with."""

Tokens = tuple[int, ...]
"""The tokens of a reply, or of its beginning."""


@dataclass
class Search:
    """The search for one prompt: the beginnings that are left, best first, and the tokens drawn so far."""

    example: Example
    prompt_ids: list[int]
    paths: list[Tokens]
    drawn: int = 0


def step_tokens(tokenizer: Any) -> set[int]:
    """The tokens that end a step."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return {token for token, text in enumerate(texts) if text.rstrip(" ").endswith(STEP_ENDS)}


def beam_search(
    generator: LocalGenerator,
    prompts: Sequence[Messages],
    examples: Sequence[Example],
    settings: Beam,
    rank: Ranking,
    sampling: Sampling,
    on_progress: Callable[[int], None] = lambda prompts: None,
) -> list[tuple[Reply, int]]:
    """(the best reply, all tokens drawn on the way to it) for each prompt.

    Each round continues every open beginning in `expand` ways up to the end of a step, and keeps the `width` best.
    """
    drawing = generator.drawing(sampling, step_tokens(generator.resident.tokenizer))
    ids = generator.checked_ids(prompts, sampling)
    searches = [Search(example, row, [()]) for example, row in zip(examples, ids, strict=True)]
    rows = Rows(sampling.max_num_seqs, "beginnings", generator.resident.say)
    size = max(1, rows.most // (settings.width * settings.expand))
    for start in range(0, len(searches), size):
        batch = searches[start : start + size]
        while grown := grow(generator, batch, settings.expand, drawing, rows):
            prune(generator, grown, settings, rank, sampling)
        on_progress(len(batch))
    return [(to_reply(generator, search, search.paths[0]), search.drawn) for search in searches]


def is_open(generator: LocalGenerator, path: Tokens, sampling: Sampling) -> bool:
    return len(path) < sampling.max_completion_length and not (path and path[-1] in generator.stops)


def grow(
    generator: LocalGenerator, searches: Sequence[Search], expand: int, drawing: Drawing, rows: Rows
) -> list[Search]:
    """Continue all open beginnings by a step; the searches that had any."""
    sampling = drawing.sampling
    jobs = [(search, path) for search in searches for path in search.paths if is_open(generator, path, sampling)]
    grown = {id(search): search for search, _ in jobs}
    for search in grown.values():
        search.paths = [path for path in search.paths if not is_open(generator, path, sampling)]
    with generator.resident.inference() as model:
        while jobs:
            now = jobs[: max(1, rows.most // expand)]
            room = sampling.max_completion_length - max(len(path) for _, path in now)
            ids = [[*search.prompt_ids, *path] for search, path in now]
            short = replace(drawing, sampling=replace(sampling, max_completion_length=room))
            work = partial(generator.decode, model, ids, expand, short)
            steps = rows.attempt(work, len(now) * expand if len(now) > 1 else 1)
            if steps is None:
                continue
            jobs = jobs[len(now) :]
            for number, step in enumerate(steps):
                search, path = now[number // expand]
                search.drawn += len(step)
                search.paths.append((*path, *step))
    return list(grown.values())


def prune(
    generator: LocalGenerator, searches: Sequence[Search], settings: Beam, rank: Ranking, sampling: Sampling
) -> None:
    """Keep the best beginnings of each search, equal ones once."""
    for search in searches:
        search.paths = list(dict.fromkeys(search.paths))
    replies = [to_reply(generator, search, path) for search in searches for path in search.paths]
    marks = iter(rank(replies, [search.example for search in searches for _ in search.paths]))
    for search in searches:
        marked = [(next(marks), path) for path in search.paths]
        marked.sort(key=lambda pair: -pair[0])  # stable: of equal ones, the earlier
        search.paths = [path for _, path in marked[: settings.width]]


def to_reply(generator: LocalGenerator, search: Search, path: Tokens) -> Reply:
    text = generator.resident.tokenizer.decode(path, skip_special_tokens=True)
    return Reply(text, path, tuple(search.prompt_ids), bool(path) and path[-1] in generator.stops)
