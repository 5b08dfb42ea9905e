"""What a run prints: its own lines, no known noise of the libraries, and every warning that is not known."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import RecipeWriter

from qreason.model.compat import noise

UNKNOWN = "the loss is made of cheese"
STEPS = "  - evaluate\n  - sft: {learning_rate: 1e-5}\n  - evaluate\n  - grpo: {num_generations: 4}\n  - merge\n"
FEW_STEPS = (
    "  - sft: {max_steps: 1}\n"
    "  - grpo: {num_generations: 4, per_device_train_batch_size: 4, max_steps: 1, preflight: false}\n"
    "  - merge\n"
)
CHEESE = (
    "import logging, warnings\n"
    "from transformers import Trainer\n"
    "step = Trainer.training_step\n"
    "def training_step(self, *args, **kwargs):\n"
    f"    warnings.warn({UNKNOWN!r})\n"
    f"    logging.getLogger('transformers.trainer').warning('logged: ' + {UNKNOWN!r})\n"
    "    return step(self, *args, **kwargs)\n"
    "Trainer.training_step = training_step\n"
)


def test_a_run_prints_no_noise_and_every_unknown_warning(write_recipe: RecipeWriter, workplace: Path) -> None:
    write_recipe((STEPS, FEW_STEPS))
    (workplace / "planted.py").write_text(
        "def cheese(replies, examples):\n    return [float('e' in reply.text) for reply in replies]\n" + CHEESE
    )
    text = (workplace / "small.yaml").read_text().replace("format: 0.1}", "format: 0.1, planted:cheese: 0.1}")
    (workplace / "small.yaml").write_text(text)
    command = [sys.executable, "-m", "qreason", "run", "small.yaml", "--set", "sft.gradient_checkpointing=true"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stderr.splitlines() if re.search("warn|deprecated|experimental|cheese", line, re.I)]
    assert [line for line in told if UNKNOWN not in line and not line.startswith("  warnings.warn")] == []
    assert sum(f"UserWarning: {UNKNOWN}" in line for line in told) >= 1
    assert sum(f"logged: {UNKNOWN}" in line for line in told) >= 1


@pytest.mark.parametrize(
    ("message", "known"),
    [
        ("You are using 'rollout_func', which is an experimental feature. This API may change", True),
        ("`past_key_values` is deprecated and will be removed in version 5.40.0 for `Qwen2ForCausalLM.forward`.", True),
        ("`gradient_checkpointing_kwargs` is deprecated and will be removed in v6. Use", True),
        ("`is_gradient_checkpointing` is deprecated and will be removed in v6. Use", True),
        ("`learning_rate` is deprecated and will be removed in v6. Use", False),
        ("Found missing adapter keys while loading the checkpoint: ['a']", False),
        ("Model with `tie_word_embeddings=True` and the tied_target_modules=['lm_head'] are part", False),
    ],
)
def test_a_warning_is_known_by_name(message: str, known: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noise.quiet()
        warnings.warn(message, FutureWarning, stacklevel=1)
    assert (not caught) == known


def test_a_logged_message_is_known_by_name(caplog: pytest.LogCaptureFixture) -> None:
    noise.quiet()
    logger = logging.getLogger("transformers.utils.generic")
    with caplog.at_level(logging.WARNING, logger.name):
        logger.addHandler(caplog.handler)  # transformers' loggers do not propagate
        logger.warning("`past_key_values`/`cache_params` are deprecated. Use `cache` instead.")
        logger.warning(UNKNOWN)
        logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {UNKNOWN}


def test_what_is_checked_elsewhere_is_known_only_there() -> None:
    missing, tied = (
        "Found missing adapter keys while loading the checkpoint: []",
        "Model has `tie_word_embeddings=True` and",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with noise.without(noise.MISSING_KEYS, noise.TIED):
            for message in (missing, tied, UNKNOWN):
                warnings.warn(message, stacklevel=1)
        warnings.warn(missing, stacklevel=1)
    assert [str(one.message) for one in caught] == [UNKNOWN, missing]


@pytest.mark.parametrize(
    ("message", "known"),
    [
        ("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).", True),
        ("Found GPU0 Tesla K80 which is of compute capability (CC) 3.7.", True),
        ("\nTesla P100 with CUDA capability sm_60 is not compatible with the current PyTorch installation.", True),
        ("CUDA is made of cheese", False),
    ],
)
def test_doctor_leaves_out_what_it_explains(message: str, known: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with noise.without(*noise.CUDA):
            warnings.warn(message, stacklevel=1)
    assert (not caught) == known


@pytest.mark.parametrize(("message", "news"), [("bitsandbytes library load error: no file", False), (UNKNOWN, True)])
def test_a_library_that_does_not_load_is_no_news_to_doctor(message: str, news: bool) -> None:
    record = logging.LogRecord("bitsandbytes.cextension", logging.ERROR, "", 0, message, None, None)
    assert noise.is_news(record) == news
