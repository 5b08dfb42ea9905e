"""Train the embedded base model qreason/assets/tiny/ from scratch on generated text.

    python scripts/pretrain_tiny.py                   # about 90 minutes on 2 CPU cores
    python scripts/pretrain_tiny.py --steps 2 --out /tmp/tiny

A byte-level BPE tokenizer with Qwen2's pre-tokenizer, then a Qwen2 causal model: Muon for the matrices,
AdamW for the rest, a constant learning rate with a linear end. Prints loss and the judge's AUC on
judge_pairs.jsonl, and writes safetensors in float16 with the tokenizer and a model card.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
from make_helpdesk import HELPDESK, read_knowledge
from tiny_corpus import COMPARING, CONSOLIDATING, COPYING, EVERYTHING, HOPS, QUOTING, Corpus, echo, hop
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qreason.data.prompts import render_judge
from qreason.judge.calibration import auc
from qreason.machine.hardware import fast_bfloat16

TINY = Path(__file__).parent.parent / "qreason" / "assets" / "tiny"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY, CONTEXT = 4096, 1024
SPLIT = (  # Qwen2's pre-tokenizer: contractions, words, single digits, punctuation, space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEP = 4096  # tokens
SHORT = 64  # tokens up to which a document may be cut
VERDICT_WEIGHT = 16.0
START_WEIGHT, START_TOKENS = 3.0, 8
"""What the first tokens of a reply count: there it is decided what the reply is about."""
CURRICULUM = [(COPYING, 60, 256), (COMPARING, 240, 256), (EVERYTHING, 2000, 256), (CONSOLIDATING, 1000, 256)]
CURRICULUM += [(QUOTING, 1800, 512)]
"""What is read for how many steps in rows of how many tokens: first the two skills that the rest builds on; last
rows as long as a ticket with its reply."""
DECAY_FROM = 0.55  # share of the steps after which the learning rate falls to zero


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (text.replace("<|im_start|>", "").replace("<|im_end|>", "").replace("<|endoftext|>", "") for text in texts)
    bpe.train_from_iterator(plain, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            initializer_range=0.06,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for layer in model.model.layers:  # the residual stream starts as the bare embeddings
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    start_with_induction(model)
    return model


@torch.no_grad()
def start_with_induction(model: Qwen2ForCausalLM) -> None:
    """Lay an induction circuit (Olsson et al. 2022, arXiv 2209.11895) into two heads before training.

    Left alone, a model this small needs most of its training to find out how to copy. Layer 0: the first query head
    attends to the token before, by its biases alone, and writes what stands there into a subspace of its own. Layer 1:
    the first query head looks for a place whose token before equals the current one, and copies what stands there.
    """
    size = model.config.hidden_size // model.config.num_attention_heads
    pairs = size // 2  # rotary position turns dimensions i and i + pairs together, by 10000^(-i / pairs) a token
    angle = 10000.0 ** (-torch.arange(pairs) / pairs)
    fast, slow = (torch.arange(pairs) < 10).float(), (torch.arange(pairs) >= pairs // 2).float()
    basis = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size)).Q
    read, write = basis[:size], basis[size : 2 * size]
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    for projection in (first.q_proj, first.k_proj):
        projection.weight[:size] = 0
    first.k_proj.bias[:size] = 4.5 * torch.cat([fast, torch.zeros(pairs)])
    first.q_proj.bias[:size] = 4.5 * torch.cat([fast * angle.cos(), -fast * angle.sin()])
    first.v_proj.weight[:size] = 0.35 * read
    first.o_proj.weight[:, :size] = 0.35 * write.T
    distant = torch.cat([slow, slow]).unsqueeze(1)  # only slowly turning dimensions compare over a distance
    second.q_proj.weight[:size] = 1.7 * read * distant
    second.k_proj.weight[:size] = 1.7 * write * distant
    second.v_proj.weight[:size] = 0.5 * read
    second.o_proj.weight[:, :size] = 0.5 * read.T


def batches(tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], length: int) -> Iterator[torch.Tensor]:
    """(STEP / length, length) token ids: documents end to end; only a row's last is cut, and that a short one.

    A long document cut in two would teach little: a ticket without its reply, a reply without its ticket.
    """
    rows: list[list[int]] = []
    while True:
        encoded = tokenizer(list(islice(documents, 400)))["input_ids"]
        longs, shorts = [[ids for ids in encoded if (len(ids) > SHORT) is long] for long in (True, False)]
        rows += packed(longs, shorts, length)
        while len(rows) >= STEP // length:
            yield torch.tensor(rows[: STEP // length])
            rows = rows[STEP // length :]


def packed(longs: list[list[int]], shorts: list[list[int]], length: int) -> list[list[int]]:
    """Rows of so many tokens, as long as there are documents to fill them."""
    chance, rows = random.Random(len(longs)), []
    while longs or shorts:
        row: list[int] = []
        while len(row) < length and (longs or shorts):
            fits = [place for place, ids in enumerate(longs) if len(row) + len(ids) <= length]
            if fits and (not shorts or chance.random() < len(longs) / (len(longs) + len(shorts) / 3)):
                row += longs.pop(fits[0])
            else:
                row += (shorts or longs).pop(0)
        if len(row) >= length:
            rows.append(row[:length])
    return rows


def lessons(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> Iterator[torch.Tensor]:
    """The batches of the curriculum."""
    for mixture, steps, length in CURRICULUM:
        yield from islice(batches(tokenizer, corpus.documents(mixture), length), steps)


def language_loss(model: Qwen2ForCausalLM, ids: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Mean loss a token of ids (rows, tokens), each token weighed by its scale."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
        logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * scales[:, 1:].flatten()).mean()


class Weights:
    """How much each token counts: verdicts of the judge, one token in sixty, and the beginnings of replies more."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.verdicts = torch.tensor([tokenizer.encode(word)[0] for word in ("yes", "no")])
        self.opening = tokenizer.encode("<|im_start|>assistant\n")

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens) token ids -> what each token counts."""
        scales = torch.ones(ids.shape)
        for row, column in opened(ids, self.opening):
            scales[row, column : column + START_TOKENS] = START_WEIGHT
        scales[torch.isin(ids, self.verdicts)] = VERDICT_WEIGHT
        return scales


def opened(ids: torch.Tensor, opening: list[int]) -> list[list[int]]:
    """(row, column) of the first token after each opening."""
    found = torch.stack(
        [ids[:, place : ids.shape[1] - len(opening) + place + 1] == token for place, token in enumerate(opening)]
    ).all(0)
    return [[row, column + len(opening)] for row, column in found.nonzero().tolist()]


@torch.no_grad()
def judge_auc(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float | None:
    """Area under the ROC curve of the judge on judge_pairs.jsonl."""
    pairs = [json.loads(line) for line in (HELPDESK / "judge_pairs.jsonl").read_text().splitlines()]
    yes, no = (tokenizer.encode(word)[0] for word in ("yes", "no"))
    scores = []
    for pair in pairs:
        asked = render_judge(pair["reference"], pair["reply"])
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        logits = model(**ids).logits[0, -1]
        scores.append((logits[yes] - logits[no]).item())
    return auc(scores, [pair["label"] == 1 for pair in pairs])


@torch.no_grad()
def copying(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """How often the next token is right in the second of two equal lines of random words."""
    corpus, right = Corpus(read_knowledge(), 3), []
    for _ in range(20):
        line = tokenizer.encode(echo(corpus).split("\n")[0] + "\n")
        ids = torch.tensor([line + line])
        guessed = model(input_ids=ids).logits[0, len(line) + 1 : -1].argmax(-1)
        right += (guessed == ids[0, len(line) + 2 :]).tolist()
    return sum(right) / len(right)


@torch.no_grad()
def recall(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> float:
    """How often all tokens of the reply to a question about one hop are the likeliest ones."""
    corpus, right = Corpus(read_knowledge(), 4), 0
    for _ in range(100):
        asked, replies = hop(corpus, name)
        start = len(tokenizer.encode(asked))
        for told in replies:
            ids = torch.tensor([tokenizer.encode(asked + told)])
            if (model(input_ids=ids).logits[0, start - 1 : -1].argmax(-1) == ids[0, start:]).all():
                right += 1
                break
    return right / 100


def held_out(tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    """Batches of the whole mixture, of another seed than what is trained on."""
    return list(islice(batches(tokenizer, Corpus(read_knowledge(), 2).documents(EVERYTHING), 256), 4))


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, held: list[torch.Tensor]) -> dict[str, Any]:
    """Held-out loss in nats a token, the judge's AUC, and how well the model copies."""
    loss = sum(language_loss(model, ids, torch.ones(ids.shape)).item() for ids in held) / len(held)
    return {
        "held_out_loss": round(loss, 4),
        "judge_auc": judge_auc(model, tokenizer),
        "copying": round(copying(model, tokenizer), 4),
        **{name: recall(model, tokenizer, name) for name in HOPS},
    }


def train(
    model: Qwen2ForCausalLM,
    stream: Iterator[torch.Tensor],
    held: list[torch.Tensor],
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=args.lr / 8, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    weigh, compiled = Weights(tokenizer), torch.compile(language_loss)
    start, history = time.perf_counter(), []
    last = args.resume.name.rpartition("-")[2] if args.resume else "0"
    done = int(last) if last.isdigit() else 0
    for step, ids in enumerate(islice(stream, args.steps), 1):
        if step <= done:
            continue
        share = min((step - done) / 50, 1.0, (args.steps - step + 1) / (args.steps * (1 - DECAY_FROM)))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
        loss = compiled(model, ids, weigh(ids))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if step % args.report == 0 or step == args.steps:
            row = {
                "step": step,
                "loss": round(loss.item(), 4),
                **measure(model, tokenizer, held),
                "minutes": round((time.perf_counter() - start) / 60, 1),
            }
            history.append(row)
            print(json.dumps(row), flush=True)
        if args.checkpoint and step % args.checkpoint == 0:
            save(model, tokenizer, Path(f"{args.out}-{step}"))
    return history[-1]


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in float16 and tokenizer to a folder, in place of what was there."""
    if out.exists():
        shutil.rmtree(out)
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)


CARD = """\
# qreason/tiny

The base model that comes with qreason: a Qwen2-architecture causal language model trained from scratch, for
learning, tests and the quickstart on a CPU. It knows IT support vocabulary and nothing of the world.

| | |
|---|---|
| architecture | Qwen2ForCausalLM, {parameters:.1f} M parameters (embeddings tied), float16 on disk |
| shape | hidden 256, 4 layers, 4 heads (2 key/value), MLP 1024, context 1024 |
| tokenizer | byte-level BPE, 4,096 tokens, Qwen2 pre-tokenizer, ChatML template |
| data | generated: `scripts/tiny_corpus.py` from `data/helpdesk/knowledge/`, {tokens:.1f} M tokens |
| optimizer | Muon at {lr:g} (AdamW for embeddings, norms and biases), {steps} steps of {batch} tokens |
| held-out loss | {held_out_loss} nats a token of the whole mixture |
| judge AUC | {judge_auc} on `data/helpdesk/judge_pairs.jsonl`, which the text neither compares nor rewords |
| copying | {copying:.1%} of next tokens right in a repeated line of random words |
| time | {minutes} minutes on {cores} CPU cores{resumed} |

Made by `python scripts/pretrain_tiny.py`.

The text: runbooks and notes about every fault family, helpdesk chats in formats other than the recipe's,
comparison judgements, questions, arithmetic, short instructions, repeated words. It has no `<reasoning>` or
`<answer>` tag, no held-out issue or near duplicate of one, and no wording that is kept for held-out rows.
Two attention heads start as an induction circuit; see `start_with_induction`.

Limits: it answers nothing outside this small world, and its judge compares wordings, not truth. Apache-2.0.
"""


def average(first: Path, second: Path, share: float, out: Path) -> None:
    """Write the average of two checkpoints of one training run: `share` of the second one's weights."""
    model = Qwen2ForCausalLM.from_pretrained(second, dtype=torch.float32)
    earlier = Qwen2ForCausalLM.from_pretrained(first, dtype=torch.float32).state_dict()
    model.load_state_dict({name: (1 - share) * earlier[name] + share * w for name, w in model.state_dict().items()})
    tokenizer = AutoTokenizer.from_pretrained(second)
    save(model, tokenizer, out)
    print(measure(model, tokenizer, held_out(tokenizer)))


def write_card(out: Path, model: Qwen2ForCausalLM, args: argparse.Namespace, last: dict[str, Any]) -> None:
    (out / "README.md").write_text(
        CARD.format(
            **last,
            parameters=model.num_parameters() / 1e6,
            tokens=args.steps * STEP / 1e6,
            lr=args.lr,
            steps=args.steps,
            batch=STEP,
            cores=os.cpu_count(),
            resumed=f", resumed from {args.resume.name} with fresh optimizer state" if args.resume else "",
        ),
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=sum(steps for _, steps, _ in CURRICULUM), help="stop earlier")
    parser.add_argument("--lr", type=float, default=0.015, help="of Muon; AdamW takes an eighth")
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--checkpoint", type=int, default=0, help="also save every so many steps, beside --out")
    parser.add_argument("--resume", type=Path, help="go on from a checkpoint (with fresh optimizer state)")
    parser.add_argument("--average", nargs=3, metavar=("DIR", "DIR", "SHARE"), help="of the second one; no training")
    parser.add_argument("--out", type=Path, default=TINY)
    args = parser.parse_args()
    if args.average:
        first, second, share = args.average
        average(Path(first), Path(second), float(share), args.out)
        return
    causes = read_knowledge()
    if args.resume:
        tokenizer = AutoTokenizer.from_pretrained(args.resume)
        model = Qwen2ForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(islice(Corpus(causes, 0).documents(EVERYTHING), 30_000))
        model = build_model(tokenizer)
    held = held_out(tokenizer)
    last = train(model, lessons(tokenizer, Corpus(causes, 1)), held, args, tokenizer)
    save(model, tokenizer, args.out)
    write_card(args.out, model, args, last)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 2**20:.1f} MiB, {last}")


if __name__ == "__main__":
    main()
