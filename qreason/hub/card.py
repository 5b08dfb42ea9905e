"""The model card: what a run's own files say about it, and how to use what is pushed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qreason.data.prompts import SYSTEM_PROMPTS
from qreason.machine.files import read_json
from qreason.model.load import EMBEDDED, locate
from qreason.run.session import Run

TAUGHT_BY = {"sft": "SFT", "grpo": "GRPO", "distill": "distillation"}
"""Stages that train the policy -> what a reader calls them."""


def model_card(run: Run, repo: str, parts: Sequence[str], files: Sequence[str]) -> str:
    """README.md of a repository with these parts (`adapter`, `merged`, `gguf`) and files."""
    sections = [
        front_matter(run, parts),
        f"# {repo.partition('/')[2]}\n\n{introduction(run, parts)}",
        training(run),
        results(run),
        judge(run),
        merging(run) if "merged" in parts else "",
        usage(run, repo, parts, files),
        limits(run),
        licences(run),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def public_base(run: Run) -> str:
    """The base's name for others: of a local folder its own name alone, never the path."""
    base = run.recipe.model.base
    return Path(base).name if Path(base).is_absolute() else base


def on_the_hub(run: Run) -> bool:
    """Whether others can load the base by its name from the Hub."""
    return not Path(run.recipe.model.base).is_absolute() and run.recipe.model.base not in EMBEDDED


def licence(run: Run) -> str | None:
    """The licence that the base's own card declares; None where there is no card at hand."""
    import yaml

    card = Path(locate(run.recipe.model.base)) / "README.md"
    if run.recipe.model.base in EMBEDDED:
        return "apache-2.0"
    if not card.is_file():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(run.recipe.model.base, "README.md") if on_the_hub(run) else None
        if not isinstance(found, str):
            return None
        card = Path(found)
    _, mark, rest = card.read_text(encoding="utf-8").partition("---\n")
    try:
        declared = yaml.safe_load(rest.partition("\n---")[0]) if mark else None
    except yaml.YAMLError:
        return None
    named = declared.get("license") if isinstance(declared, dict) else None
    return str(named) if named else None


def front_matter(run: Run, parts: Sequence[str]) -> str:
    import yaml

    fields: dict[str, Any] = {"library_name": "transformers" if "merged" in parts else "peft"}
    if named := licence(run):
        fields["license"] = named
    if on_the_hub(run):
        fields["base_model"] = run.recipe.model.base
    fields |= {"pipeline_tag": "text-generation", "tags": ["qreason", "reasoning", *stages(run)]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def stages(run: Run) -> list[str]:
    """The stages that trained the policy, in order, each once."""
    return list(dict.fromkeys(e["stage"] for e in run.manifest["steps"] if e["stage"] in TAUGHT_BY))


def introduction(run: Run, parts: Sequence[str]) -> str:
    kinds = {"adapter": "a LoRA adapter", "merged": "the merged model", "gguf": "GGUF files"}
    held = " and ".join(kinds[part] for part in kinds if part in parts)
    model = run.recipe.model
    quantized = " in 4-bit (NF4)" if model.quantization == "nf4" else ""
    by = " and ".join(TAUGHT_BY[stage] for stage in stages(run)) or "training elsewhere"
    return (
        f"{held[0].upper()}{held[1:]}, made from `{public_base(run)}`{quantized} by {by} with qreason "
        f"{run.manifest['qreason']}. It writes its steps inside `<reasoning>` and its answer inside `<answer>`."
    )


def training(run: Run) -> str:
    lines = ["## Training", "", "| | |", "|---|---|"]
    for key, source in run.recipe.data.sources.items():
        known = run.manifest["data"].get(key, "")
        shown = Path(source).name if known.startswith("sha256:") else source
        lines.append(f"| data, {key} | `{shown}` {f'({known[:23]}…)' if known.startswith('sha256:') else ''} |")
    lora = run.recipe.model.lora
    lines.append(f"| LoRA | r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout:g} |")
    if "grpo" in stages(run):
        lines.append(f"| rewards | {', '.join(f'{name} {w:g}' for name, w in run.recipe.weights.items())} |")
    for step in run.recipe.steps[: run.finished]:
        if step.stage in TAUGHT_BY:
            told = step.settings.model_dump(
                include={"learning_rate", "num_train_epochs", "max_steps", "num_generations", "rows"}, exclude_none=True
            )
            listed = [f"{name} {value:g}" for name, value in told.items() if name != "max_steps" or value > 0]
            lines.append(f"| {step.stage} | {', '.join(listed)} |")
    versions = ", ".join(f"{name} {number}" for name, number in run.manifest["versions"].items())
    hardware = run.manifest.get("hardware", {})
    lines.append(f"| seed | {run.recipe.seed} |")
    lines.append(f"| machine | {hardware.get('name') or hardware.get('device', 'unknown')}; {versions} |")
    return "\n".join(lines)


def read_report(run: Run) -> dict[str, Any] | None:
    file = run.folder / "report.json"
    report: dict[str, Any] | None = read_json(file) if file.is_file() else None
    return report


def interval(measure: dict[str, Any], scale: float = 100, unit: str = "%", digits: int = 1) -> str:
    if measure["mean"] is None:
        return "–"
    mean, low, high = (measure[key] * scale for key in ("mean", "low", "high"))
    return f"{mean:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def results(run: Run) -> str:
    """Before and after, as the run measured it."""
    report = read_report(run)
    if report is None:
        return "## Results\n\nThis run has no evaluation: nothing is known about how good the model is."
    lines = ["## Results", "", "| after | accuracy | pass@1 | format | reward |", "|---|---|---|---|---|"]
    for row in report["passes"]:
        shares = " | ".join(interval(row[key]) for key in ("accuracy", "pass_at_1", "format"))
        lines.append(f"| {row['after']} | {shares} | {interval(row['reward'], 1, '', 2)} |")
    if report["gains"]:
        last = report["gains"][-1]
        lines += ["", f"Gain from {last['from']} to {last['to']}, the same rows compared: accuracy "]
        lines[-1] += (
            f"{interval(last['accuracy'], unit='')} points, pass@1 {interval(last['pass_at_1'], unit='')} points."
        )
    lines += [
        "",
        f"{report['rows']} held-out rows, seed {report['seed']}; brackets are 95 % intervals. Accuracy, format and "
        "reward are of the most probable reply, pass@1 is of drawn ones.",
    ]
    return "\n".join(lines)


def judge(run: Run) -> str:
    """How good the judge behind the rewards was, where it was measured."""
    told = [
        read_json(file).get("told")
        for entry in run.manifest["steps"]
        if (file := run.folder / entry["folder"] / "judge.json").is_file() and entry["stage"] == "grpo"
    ]
    return f"## The judge\n\nOne of the rewards asks a judge: {told[-1]}." if told and told[-1] else ""


def merging(run: Run) -> str:
    newest = newest_merge(run)
    if newest is None:
        return ""
    report = read_json(newest.parent / "merge.json")
    figures = report["bases"][report["base"]]
    base = "the base as it was trained on" if report["base"] == "trained" else "the original 16-bit base"
    right = ""
    if report["right"] is not None:
        right = (
            f" On {report['rows']} held-out rows it is right {figures['right']} times, the adapter {report['right']}."
        )
    return (
        f"## Merging\n\nThe adapter was folded, in float32, into {base}, and stored in {report['dtype']}; the stored "
        f"model is {figures['kl']:.1e} nats a token (KL divergence) from the trained one.{right}"
    )


def newest_merge(run: Run) -> Path | None:
    """The merged model that was made last: of a merge step, or by `qreason merge RUN`."""
    made = [
        file.parent for file in run.folder.glob("*/merge.json") if (file.parent / "model" / "config.json").is_file()
    ]
    return max(made, key=lambda folder: (folder / "merge.json").stat().st_mtime) / "model" if made else None


def usage(run: Run, repo: str, parts: Sequence[str], files: Sequence[str]) -> str:
    base = public_base(run)
    system = SYSTEM_PROMPTS[run.recipe.data.prompt]
    lines = ["## Use", "", "The model was trained with this system message; give it the same:", "", f"> {system}"]
    ask = (
        f'messages = [{{"role": "system", "content": "{system}"}},\n            {{"role": "user", "content": "…"}}]\n'
        "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
        'return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens="
        f"{run.recipe.sampling.max_completion_length})[0]))"
    )
    if "merged" in parts:
        lines += ["", "With transformers:", "", "```python"]
        lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{repo}")']
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{repo}")', ask, "```"]
    if "adapter" in parts:
        inside = ', subfolder="adapter"' if "merged" in parts else ""
        name = f'locate("{base}")' if base in EMBEDDED else f'"{base}"'
        lines += ["", "The adapter with PEFT:", "", "```python", "from peft import PeftModel"]
        lines += ["from qreason.models import locate"] * (base in EMBEDDED)
        lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({name})"]
        lines += [f"base = AutoModelForCausalLM.from_pretrained({name})"]
        lines += [f'model = PeftModel.from_pretrained(base, "{repo}"{inside})', ask, "```"]
    if "gguf" in parts:
        gguf = next(file for file in files if file.endswith(".gguf"))
        name = repo.partition("/")[2].lower()
        ollama = f"ollama create {name} -f Modelfile && ollama run {name}"
        lines += ["", "With Ollama:" if "Modelfile" in files else "With llama.cpp:", "", "```"]
        lines += [f"hf download {repo} --local-dir ."]
        lines += [ollama if "Modelfile" in files else f"llama-server -m {gguf} --jinja", "```"]
    return "\n".join(lines)


def limits(run: Run) -> str:
    report = read_report(run)
    lines = ["## Limits", ""]
    if report is not None:
        lines.append(
            f"- The numbers are from {report['rows']} rows of one data set and one seed; other questions, and other "
            "wordings of these, may go worse."
        )
        last = report["passes"][-1]["accuracy"]
        if last["mean"] is not None:
            lines.append(f"- {1 - last['mean']:.0%} of its most probable replies to held-out rows were not right.")
    lines.append("- Its reasoning is text that earned rewards; it need not be how it came to the answer.")
    lines.append("- It was trained for one kind of task and one system message. Nothing was done about safety.")
    return "\n".join(lines)


def licences(run: Run) -> str:
    named = licence(run)
    told = f"The base's licence is {named}" if named else f"See the licence of the base, `{public_base(run)}`,"
    return (
        f"## Licences\n\n{told}; it holds for what is made from it. The data have terms of their own: see where they "
        "come from before you pass this model on."
    )
