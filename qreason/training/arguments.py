"""The arguments of TRL's configs, and what TRL would refuse of them, found before anything is loaded."""

from __future__ import annotations

import dataclasses
import tempfile
import typing
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from qreason.errors import first_line, kind_and_line, nearest
from qreason.machine.hardware import Hardware
from qreason.recipe.training import Training

CONFIGS = {"sft": "SFTConfig", "grpo": "GRPOConfig", "distill": "DistillationConfig", "preference": "RewardConfig"}
"""Stage -> the class of trl that its settings are for."""
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit", "kubeflow": "kubernetes"}
"""`report_to` -> the package to install, where it has another name."""
USUAL_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
USUAL_OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")


def is_usual(settings: Training) -> bool:
    """Whether a step has nothing that TRL must be asked about, which takes seconds to import."""
    usual = settings.lr_scheduler_type in USUAL_SCHEDULERS and settings.optim in USUAL_OPTIMIZERS
    return usual and not settings.trl


def trl_arguments(settings: Training, seed: int, hardware: Hardware, folder: Path) -> dict[str, Any]:
    """The keyword arguments of a step's TRL config, every one explicit."""
    return {
        **settings.trl_arguments(),
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": hardware.device == "cpu",
        "bf16": hardware.autocast == "bfloat16",
        "fp16": hardware.autocast == "float16",
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": hardware.device == "cuda",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        **settings.trl,
    }


def refused_arguments(stage: str, settings: Training, hardware: Hardware) -> list[str]:
    """What TRL would refuse of a step's settings: unknown fields, wrong values, what is not installed."""
    kind = getattr(import_module("trl"), CONFIGS[stage])
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    problems = [
        f"{stage}.trl.{key}: {kind.__name__} of this TRL has no such field{nearest(key, fields)}"
        for key in settings.trl
        if key not in fields
    ]
    known = settings.model_copy(update={"trl": {key: value for key, value in settings.trl.items() if key in fields}})
    problems += wrong_values(stage, known, kind)
    if problems:
        return problems
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl_arguments(known, 0, hardware, Path(folder))
        try:
            config = kind(**arguments)
        except Exception as error:
            return [f"{stage}: {kind.__name__} refuses its settings: {first_line(error)}"]
    return unusable(stage, config)


def wrong_values(stage: str, settings: Training, kind: type) -> list[str]:
    """Names that transformers does not know, and values in `trl` of another type than the field's."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    problems, names = [], settings.trl_arguments() | {"report_to": "none"} | settings.trl
    enums = {
        "lr_scheduler_type": [one.value for one in SchedulerType],
        "optim": [one.value for one in OptimizerNames],
        "report_to": [*INTEGRATION_TO_CALLBACK, "all", "none"],
    }
    for key, known in enums.items():
        for value in names[key] if isinstance(names[key], list) else [names[key]]:
            if value not in known:
                place = f"{stage}.trl.{key}" if key in settings.trl else f"{stage}.{key}"
                problems.append(f"{place}: there is no '{value}'{nearest(str(value), known)}; {', '.join(known)}")
    hints: dict[str, Any] = {}
    with suppress(NameError, TypeError):  # a type that is imported for type checkers only
        hints = typing.get_type_hints(kind)
    for key, value in settings.trl.items():
        if key in enums or key not in hints:
            continue
        try:
            TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True, strict=True)).validate_python(value)
        except ValidationError as error:
            written = "; write 1e-5 as 1.0e-5" if isinstance(value, str) else ""  # PyYAML reads it as a text
            problems.append(f"{stage}.trl.{key}: {value!r}: {error.errors()[0]['msg']}{written}")
        except TypeError:  # pydantic has no schema for this type
            continue
    return problems


def unusable(stage: str, config: Any) -> list[str]:
    """What the trainer would miss when it starts: integrations, the optimizer's package, arguments of the scheduler."""
    import torch
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations

    problems, installed = [], get_available_reporting_integrations()
    for name in config.report_to:
        if name not in installed:
            package = PACKAGES.get(name, name)
            problems.append(f"{stage}.trl.report_to: {name} is not installed: pip install {package}; or leave it out")
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        Trainer.get_optimizer_cls_and_kwargs(config, torch.nn.Linear(1, 1))
    except Exception as error:
        problems.append(f"{stage}.optim: {config.optim.value} cannot be used here: {kind_and_line(error)}")
    try:
        get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD([parameter], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except Exception as error:
        name = config.lr_scheduler_type.value
        problems.append(f"{stage}.lr_scheduler_type: {name} cannot be used so: {kind_and_line(error)}")
    return problems
