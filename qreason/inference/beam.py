"""Step-wise beam search: partial replies grow sentence by sentence, and the best ones are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qreason.inference.selection import Ranking
from qreason.recipe.settings import Beam
from qreason.types import Example, Generator, Messages, Reply, Sampling

STEP_ENDS = (".", "!", "?", "\n")
"""The characters that end a step of reasoning."""

Tokens = tuple[int, ...]
"""The tokens of a whole or partial reply."""


@dataclass
class Search:
    """The search for one prompt: the kept partial replies, best first, and the number of tokens drawn so far."""

    example: Example
    prompt_ids: list[int]
    paths: list[Tokens]
    drawn: int = 0


def beam_search(
    generator: Generator,
    prompts: Sequence[Messages],
    examples: Sequence[Example],
    settings: Beam,
    rank: Ranking,
    sampling: Sampling,
    on_progress: Callable[[int], None] = lambda prompts: None,
) -> list[tuple[Reply, int]]:
    """(best reply, number of all tokens drawn) for each prompt.

    Each round continues every open partial reply in `expand` ways up to the end of a step, and keeps the `width` best.
    """
    ends = generator.step_tokens(STEP_ENDS)
    ids = generator.prompt_ids(prompts, sampling)
    searches = [Search(example, row, [()]) for example, row in zip(examples, ids, strict=True)]
    size = max(1, sampling.max_num_seqs // (settings.width * settings.expand))
    for start in range(0, len(searches), size):
        batch = searches[start : start + size]
        while grown := grow(generator, batch, settings.expand, sampling, ends):
            prune(generator, grown, settings, rank, sampling)
        on_progress(len(batch))
    return [(to_reply(generator, search, search.paths[0]), search.drawn) for search in searches]


def is_open(generator: Generator, path: Tokens, sampling: Sampling) -> bool:
    return len(path) < sampling.max_completion_length and not (path and path[-1] in generator.stops)


def grow(
    generator: Generator, searches: Sequence[Search], expand: int, sampling: Sampling, ends: set[int]
) -> list[Search]:
    """Continue all open partial replies by a step; returns the searches that had any."""
    jobs = [(search, path) for search in searches for path in search.paths if is_open(generator, path, sampling)]
    grown = {id(search): search for search, _ in jobs}
    for search in grown.values():
        search.paths = [path for path in search.paths if not is_open(generator, path, sampling)]
    if not jobs:
        return []
    room = sampling.max_completion_length - max(len(path) for _, path in jobs)
    ways = generator.extend(
        [[*search.prompt_ids, *path] for search, path in jobs],
        n=expand,
        sampling=replace(sampling, max_completion_length=room),
        stop_at=ends,
    )
    for (search, path), steps in zip(jobs, ways, strict=True):
        search.drawn += sum(map(len, steps))
        search.paths += [(*path, *step) for step in steps]
    return list(grown.values())


def prune(generator: Generator, searches: Sequence[Search], settings: Beam, rank: Ranking, sampling: Sampling) -> None:
    """Keep the best partial replies of each search, without duplicates."""
    for search in searches:
        search.paths = list(dict.fromkeys(search.paths))
    replies = [to_reply(generator, search, path) for search in searches for path in search.paths]
    scores = iter(rank(replies, [search.example for search in searches for _ in search.paths]))
    for search in searches:
        scored = [(next(scores), path) for path in search.paths]
        scored.sort(key=lambda pair: -pair[0])  # stable: of equal ones, the earlier
        search.paths = [path for _, path in scored[: settings.width]]


def to_reply(generator: Generator, search: Search, path: Tokens) -> Reply:
    text = generator.text(path)
    return Reply(text, path, tuple(search.prompt_ids), bool(path) and path[-1] in generator.stops)
