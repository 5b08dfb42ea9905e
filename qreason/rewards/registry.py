"""The rewards by name, their settings, and building those of a recipe.

A reward takes replies and examples and returns one number per reply, or None where it could not judge. Its keyword-only
parameters are its settings in a recipe. To add one: write the function in a file of this folder and give it a line in
REWARDS, or name it `my_module:my_reward` in a recipe.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model

from qreason.errors import first_line, kind_and_line
from qreason.machine.foreign import place_of
from qreason.rewards.judged import JudgeSettings, PreferenceSettings, judge_reward, preference_reward
from qreason.rewards.language import language_consistency
from qreason.rewards.marks import Own
from qreason.rewards.mathematics import math
from qreason.rewards.programs import code
from qreason.rewards.reasoned import GainSettings, StepsSettings, gain_reward, steps_reward
from qreason.rewards.scoring import Restricted
from qreason.rewards.shape import cosine_length, repetition, soft_overlong, step_count
from qreason.rewards.tags import format_strict, format_tags, tag_count
from qreason.rewards.text import correctness, length, rouge_l
from qreason.types import Reward

REWARDS: dict[str, Callable[..., list[float | None]]] = {
    "correctness": correctness,
    "math": math,
    "code": code,
    "format": format_tags,
    "format_strict": format_strict,
    "tag_count": tag_count,
    "step_count": step_count,
    "rouge_l": rouge_l,
    "length": length,
    "soft_overlong": soft_overlong,
    "cosine_length": cosine_length,
    "repetition": repetition,
    "language_consistency": language_consistency,
}
"""Rewards that need nothing but the reply and its example."""


OPENED_REWARDS: dict[str, tuple[type[BaseModel], Callable[[Any, Any], Reward]]] = {
    "judge": (JudgeSettings, lambda settings, judge: judge_reward(judge)),
    "preference": (PreferenceSettings, preference_reward),
    "consistent_steps": (StepsSettings, lambda settings, references: steps_reward(references)),
    "reasoning_gain": (GainSettings, gain_reward),
}
"""Rewards that need a model or the data: their settings, and (settings, what was opened for them) -> the reward."""
NAMES = (*REWARDS, *OPENED_REWARDS)
ABOUT_REASONING = {"consistent_steps", "reasoning_gain"}
"""Rewards that leave out the rows of data.plain by themselves, which are not asked for reasoning."""
FULL_MARKS: dict[str, float] = {
    "correctness": 2.0,
    "format": 0.8,
    "format_strict": 1.0,
    "tag_count": 1.0,
    "rouge_l": 1.0,
    "length": 1.0,
    "math": 1.0,
}
"""What a gold reply earns, for the rewards where that is known."""
REFERENCED = {"correctness", "math", "code", "rouge_l", "length", "judge", "cosine_length", "reasoning_gain"}
"""Rewards that compare with the reference: without one they cannot tell replies apart."""
CALL_SECONDS = 300.0
"""How long one call of a reward of one's own may take, unless the recipe says otherwise."""
LIMIT = "max_completion_length"
"""A setting that defaults to the recipe's sampling."""


def find(name: str) -> Callable[..., list[float | None]]:
    """A rule-based reward by name, or a custom function as `module:function`.

    Raises ValueError where there is no such module or function.
    """
    if ":" not in name:
        return REWARDS[name]
    module, _, function = name.partition(":")
    if (here := os.getcwd()) not in sys.path:  # as where Python itself is started
        sys.path.append(here)
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name}: {first_line(error)}; the module must lie here or beside the recipe") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}: its module raises {kind_and_line(error)} ({place_of(error)})") from error
    if (found := getattr(imported, function, None)) is None:
        raise ValueError(f"{name}: {module} has no function '{function}'")
    if not callable(found):
        raise ValueError(f"{name}: not a function")
    return found  # type: ignore[no-any-return]


def settings_model(name: str) -> type[BaseModel]:
    """The settings of a reward: those of an opened reward, or the keyword-only parameters of its function."""
    if name in OPENED_REWARDS:
        return OPENED_REWARDS[name][0]
    function = find(name)
    try:
        parameters = keyword_only(function)
        fields: dict[str, Any] = {
            parameter.name: (
                Any if parameter.annotation is parameter.empty else parameter.annotation,
                ... if parameter.default is parameter.empty else parameter.default,
            )
            for parameter in parameters
        }
        config = ConfigDict(
            extra="forbid", arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=":" in name
        )
        return create_model(f"{name} settings", __config__=config, **fields)
    except Exception as error:
        raise ValueError(f"{name}: its settings cannot be read from its parameters ({first_line(error)})") from error


def keyword_only(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The keyword-only parameters of a function; none where it does not say what it takes, as one written in C."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except ValueError:
        return []
    return [one for one in signature.parameters.values() if one.kind is one.KEYWORD_ONLY]


def build(
    wanted: Mapping[str, Mapping[str, Any]],
    open_needed: Callable[[Any], Any],
    max_completion_length: int,
    kinds: Mapping[str, str] | None = None,
    only: Mapping[str, Literal["reasoning", "plain"] | None] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Reward]:
    """The rewards of a recipe (name -> settings), ready to be called.

    `open_needed` opens what a reward of OPENED_REWARDS needs, from its settings. `kinds` maps custom names in the
    recipe to rewards, `only` says for which rows a reward is, `seconds` how long a call of one's own may take.
    """
    rewards: dict[str, Reward] = {}
    for name, given in wanted.items():
        kind = (kinds or {}).get(name, name)
        rows = (only or {}).get(name) or ("reasoning" if kind in ABOUT_REASONING else None)
        model = settings_model(kind)
        known = {LIMIT: max_completion_length} if LIMIT in model.model_fields else {}
        settings = model.model_validate(known | dict(given))
        if kind in OPENED_REWARDS:
            reward = OPENED_REWARDS[kind][1](settings, open_needed(settings))
        else:
            reward = partial(find(kind), **dict(settings))
            reward = Own(name, reward, (seconds or {}).get(name, CALL_SECONDS)) if ":" in kind else reward
        rewards[name] = Restricted(reward, rows == "plain") if rows else reward
    return rewards
