"""Judgements a second: one forward pass against a generated score, and a group with and without its shared prefix.

    python scripts/bench_judge.py                       # the embedded model
    python scripts/bench_judge.py --base Qwen/Qwen2.5-0.5B-Instruct --pairs 64

The peer asks the same base about the same pairs and lets it write a score in up to 16 tokens (greedy, batched, through
transformers' generate, stopping where the model stops). The pairs are those of GRPO: eight
replies to a prompt, some of them equal. Prints medians of several rounds, each round all ways in turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from make_helpdesk import read_knowledge, sentence, typo

from qreason.data.prompts import render_judge
from qreason.inference.generate import LocalGenerator
from qreason.judge.verdict import Judge, LocalModel
from qreason.machine.hardware import detect
from qreason.model.resident import Resident
from qreason.recipe.sections import Lora, Model
from qreason.types import Messages

NEW_TOKENS = 16
BATCH = 64
GROUP = 8
SCORING = "Compare the response with the reference. Reply with a score from 0.0 to 1.0."
Pairs = list[tuple[str, str]]


def make_groups(count: int) -> list[Pairs]:
    """Groups of eight (reference, reply): as a policy half-way writes them, right, reworded, misspelt or wrong."""
    rng = random.Random(1)
    causes = read_knowledge()
    groups = []
    for cause in rng.sample(causes, count):
        wrong = [fix for other in causes if other.family == cause.family for fix in other.fixes]
        replies = [rng.choice((*cause.fixes, rng.choice(wrong), typo(rng.choice(wrong), rng))) for _ in range(GROUP)]
        groups.append([(sentence(cause.fixes[0]), sentence(reply)) for reply in replies])
    return groups


def write_scores(resident: Resident, pairs: Pairs) -> list[list[int]]:
    """The peer: the score as generated text. Returns the tokens it wrote for each pair."""
    import torch

    tokenizer = resident.tokenizer
    written: list[list[int]] = []
    texts = [tokenizer.apply_chat_template(ask(*pair), tokenize=False, add_generation_prompt=True) for pair in pairs]
    with torch.no_grad():
        for start in range(0, len(texts), BATCH):
            inputs = tokenizer(
                texts[start : start + BATCH], return_tensors="pt", padding=True, add_special_tokens=False
            )
            inputs = inputs.to(resident.device)
            ids = resident.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :].tolist()
            written += [[token for token in row if token != tokenizer.pad_token_id] for row in new]
    return written


def ask(reference: str, response: str) -> Messages:
    """The judge's question, to be answered by a score in words."""
    system, question = render_judge(reference, response)
    return [system | {"content": SCORING}, question]


def one_by_one(judge: Judge, groups: list[Pairs]) -> None:
    """The same judge, without shared prefixes: one pair of each group a call."""
    for position in range(GROUP):
        judge([group[position] for group in groups])


def seconds(what: Callable[[], object]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="qreason/tiny")
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--groups", type=int, default=32, help="of eight pairs")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    resident = Resident(Model(base=args.base, quantization=args.quantization), detect())
    groups = make_groups(args.groups)
    pairs = [pair for group in groups for pair in group]
    distinct = [list(dict.fromkeys(group)) for group in groups]

    def fresh() -> Judge:
        return Judge(LocalModel(LocalGenerator(resident)))

    ways: dict[str, Callable[[], object]] = {
        "score written as text": lambda: write_scores(resident, pairs),
        "one forward pass": lambda: fresh()(pairs),
        "the same, groups apart": lambda: one_by_one(fresh(), groups),
    }
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    per_second = {name: len(pairs) / statistics.median(values) for name, values in times.items()}
    text, own, apart = per_second.values()
    figures = {
        "base": args.base,
        "device": resident.hardware.name or resident.hardware.device,
        "pairs": len(pairs),
        "distinct": sum(map(len, distinct)),
        "judgements_per_second": {name: round(value, 1) for name, value in per_second.items()},
        "times_faster_than_text": round(own / text, 2),
        "times_faster_than_apart": round(own / apart, 2),
        "tokens_written_as_text": round(statistics.mean(map(len, write_scores(resident, pairs))), 1),
        "extra_weight_bytes": extra_bytes(resident),
    }
    print(json.dumps(figures, indent=2))


def extra_bytes(resident: Resident) -> int:
    """Bytes of weights that a judge holds beyond the policy's base and adapter: of any module that is alive."""
    resident.new_adapter(Lora())
    before = storages()
    judge = Judge(LocalModel(LocalGenerator(resident)))
    judge([("a", "b")])
    held = storages()
    assert judge.verdicts
    return sum(size for address, size in held.items() if address not in before)


def storages() -> dict[int, int]:
    """Address -> bytes of every parameter and buffer of every module in the process."""
    import torch

    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


if __name__ == "__main__":
    main()
