"""Pull: an adapter made elsewhere, on the Hub or in a folder, to merge, export, measure or train further."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qreason.data.examples import choose_prompt
from qreason.errors import InputError, ModelError
from qreason.hub.access import fetch_adapter
from qreason.machine.files import read_json, write_json
from qreason.model.load import is_here, read_base_config, stored_quantization
from qreason.recipe.schema import Recipe
from qreason.recipe.settings import Pull
from qreason.run.session import Artifact, Session


def stage(settings: Pull, run: Session) -> Artifact:
    """Copy an adapter of the recipe's base into the run folder."""
    source, about = fetch_adapter(settings.repo, settings.revision, run.say)
    config = read_json(source / "adapter_config.json", dict[str, Any])
    pushed, base = about.get("base") or {}, run.recipe.model.base
    named = config.get("base_model_name_or_path")
    if not settings.other_base and named and named != base:
        raise ModelError(
            f"{settings.repo}: an adapter for {named}, not for {base}; set model.base to its base, or, if both are the "
            "same model, other_base: true of the pull step"
        )
    if not settings.other_base and str(pushed.get("fingerprint")).startswith("sha256:"):
        run.disk.manifest.setdefault("base", {"id": base, "fingerprint": pushed["fingerprint"]})
    folder = run.clear_stage_folder() / "adapter"
    folder.mkdir()
    shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": base})
    return Artifact(folder, f"{settings.repo}, an adapter for {base}")


def recipe_of(repo: str, revision: str | None, base: str | None, heldout: Path | None, run_say: Any) -> Recipe:
    """A recipe of one step that pulls an adapter; what its card does not say comes from its PEFT configuration."""
    source, about = fetch_adapter(repo, revision, run_say)
    config = read_json(source / "adapter_config.json", dict[str, Any])
    named = config.get("base_model_name_or_path")
    if base is None and (not named or (Path(named).is_absolute() and not Path(named).is_dir())):
        raise InputError(f"{repo}: the adapter does not say which base on the Hub it is for; give it with --base")
    wanted, place = base or str(named), Path(repo)
    four_bit = wanted.endswith("-bnb-4bit") or (is_here(wanted) and stored_quantization(read_base_config(wanted)))
    sampling, data = about.get("sampling"), {key: about[key] for key in ("prompt", "system") if key in about}
    try:
        fallback = {
            "lora": {key: config[f"lora_{key}"] for key in ("alpha", "dropout")} | {"r": config["r"]},
            "quantization": "nf4" if four_bit else "none",
        }
        recipe = Recipe.model_validate(
            {
                "name": re.sub(r"[^A-Za-z0-9._-]", "-", place.name if place.name != "adapter" else place.parent.name),
                "model": {**(about.get("model") or fallback), "base": wanted},
                "data": (data or ({} if heldout else {"prompt": "helpdesk"}))
                | ({"heldout": str(heldout)} if heldout else {}),
                "rewards": {"correctness": 0.1, "format": 0.1},
                "steps": [{"pull": {"repo": repo, "revision": revision, "other_base": base is not None}}],
                **({"sampling": sampling} if isinstance(sampling, dict) else {}),
            }
        )
        return recipe.model_copy(update={"data": choose_prompt(recipe.data)})
    except (ValidationError, KeyError, TypeError) as error:
        raise InputError(f"{repo}: not an adapter of qreason or PEFT that can be read ({error!r:.150})") from None
