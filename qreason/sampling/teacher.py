"""Replies of a teacher behind an OpenAI-compatible server: parallel requests, and no reply lost when it fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from qreason.data.prompts import render
from qreason.errors import ModelError, QReasonError, TrainingError
from qreason.recipe.sections import Draw
from qreason.recipe.training import Teacher
from qreason.sampling.draws import Drawn
from qreason.sampling.endpoint import Completion, Endpoint, NoAnswerError
from qreason.types import Example, Reply

THOUGHTS = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)

Wanted = tuple[Example, int]
"""(example, number of the draw)"""


def request_body(draw: Draw) -> dict[str, Any]:
    """Sampling parameters for the API; those that only some servers know (top_k, min_p) are sent only if set."""
    body: dict[str, Any] = {"max_tokens": draw.max_completion_length, "temperature": draw.temperature}
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return body | {key: getattr(draw, key) for key, value in neutral.items() if getattr(draw, key) != value}


def ask_teacher(settings: Teacher, wanted: Sequence[Wanted], system: str, draw: Draw) -> Iterator[list[Drawn]]:
    """Replies as they arrive, with `settings.concurrency` parallel requests.

    Raises TrainingError, after the last reply, if the server stopped answering (`concurrency` failed requests in a
    row) or left requests unanswered; a later call needs to ask only for those.
    """
    assert settings.endpoint
    server = Endpoint(
        settings.endpoint, settings.model, settings.api_key, timeout=settings.timeout, retries=settings.retries
    )
    body, todo = request_body(draw), iter(wanted)
    flying: dict[Future[Completion], Wanted] = {}
    silent = unanswered = 0
    problem: QReasonError | None = None
    with ThreadPoolExecutor(settings.concurrency) as pool:
        try:
            while True:
                gone = silent >= settings.concurrency or isinstance(problem, ModelError)
                while not gone and len(flying) < 2 * settings.concurrency and (one := next(todo, None)):
                    flying[pool.submit(server.complete, render(one[0], system), **body)] = one
                if gone:  # running requests may still be answered
                    flying = {future: one for future, one in flying.items() if not future.cancel()}
                if not flying:
                    break
                arrived = []
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    one = flying.pop(future)
                    try:
                        completion = future.result()
                        if completion.problem:
                            raise NoAnswerError(f"{settings.endpoint}: {completion.problem}")
                        arrived.append(read_draw(one, completion))
                        silent = 0
                    except NoAnswerError as error:
                        silent, unanswered, problem = silent + 1, unanswered + 1, problem or error
                    except ModelError as error:
                        problem = error
                if arrived:
                    yield arrived
        finally:
            for future in flying:
                future.cancel()
    if isinstance(problem, ModelError):
        raise problem
    if problem:
        stopped = "the teacher does not answer" if gone else f"{unanswered} requests were not answered"
        raise TrainingError(f"{stopped}: {problem}; replies so far are kept, run the same command again to go on")


def read_draw(one: Wanted, completion: Completion) -> Drawn:
    """A completion as a draw, without the thoughts of a reasoning model."""
    reply = Reply(THOUGHTS.sub("", completion.text), finished=completion.finished)
    return Drawn(*one, reply, completion.prompt_tokens, completion.completion_tokens)
