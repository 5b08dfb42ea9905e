"""Known library messages that do not matter here, by name; any other one reaches the user."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS = (
    # TRL 1.14.2 and 1.16.0: the seam is experimental; tests/test_compat.py and the pipeline's tests go through it.
    "You are using 'rollout_func', which is an experimental feature",
    # transformers 5.24.0: old names, which 5.10.0 to 5.17.0 have alone. They end in 5.40 and 6, beyond our bounds.
    "`past_key_values` is deprecated and will be removed in version",
    "`(is_)?gradient_checkpointing(_kwargs|_enable|_disable)?` is deprecated and will be removed in v6",
)
"""Python warnings of every run (regular expressions of their beginnings)."""
MISSING_KEYS = "Found missing adapter keys while loading the checkpoint"
"""PEFT 0.20.0 and 0.21.2, while an adapter is loaded: hidden where check_weights raises an error for it."""
TIED = "Model (with|has) `tie_word_embeddings=True` and"
"""PEFT 0.20.0 and 0.21.2, while an adapter is put on or merged: hidden where the layers were untied before."""
CUDA = (
    r"CUDA initialization:",
    r"Found GPU\d+ ",
    r"\s*\S.* with CUDA capability sm_\d+ is not compatible",
    r"Can't initialize NVML",
)
"""torch 2.13, about a GPU that it cannot use: `qreason doctor` reports it with the cure."""

LOGGED = (
    # bitsandbytes 0.50.0 and 0.50.2, where its library does not load: `qreason doctor` reports it with the cure.
    "bitsandbytes library load error",
    # transformers 5.24.0: the old name, which TRL and 5.10.0 to 5.17.0 have alone.
    "`past_key_values`/`cache_params` are deprecated",
)
"""What is logged (beginnings of messages)."""


def quiet() -> None:
    """Hide the libraries' progress bars and known warnings; call it before models are loaded."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # it is imported later: that takes a second
    if loaded := sys.modules.get("datasets"):
        loaded.disable_progress_bars()
    logging.getLogger("transformers.utils.generic").addFilter(is_news)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)


@contextmanager
def without(*messages: str) -> Iterator[None]:
    """Within it, warnings that match one of these regular expressions at their beginning are hidden too."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message)
        yield


def is_news(record: logging.LogRecord) -> bool:
    """Whether a logged message is none of LOGGED."""
    return not record.getMessage().startswith(LOGGED)
