"""What the user gives: recipes, overrides, data files, arguments."""

from __future__ import annotations

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzzing.sample import PAIR, RECIPE, REPLY, ROW
from fuzzing.strange import VALUES, Surface, as_json, as_lines, as_yaml, attempt, broken, call, changed, damaged, places
from qreason.data.examples import read_examples
from qreason.data.pairs import read_pairs
from qreason.judge.calibration import read_labels
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Data


def recipes() -> Surface:
    raw = as_yaml(RECIPE)

    def read(text: bytes) -> None:
        Path("odd.yaml").write_bytes(text)
        attempt(lambda: load_recipe("odd.yaml").dump())

    return damaged("odd.yaml", raw), read


def overrides() -> Surface:
    known = [".".join(map(str, place)) for place in places(RECIPE) if place and isinstance(place[0], str)]
    known += [
        "sft.learning_rate",
        "sft.trl",
        "grpo.rewards",
        "grpo.rows",
        "evaluate.samples",
        "data.where",
        "data.fields",
    ]
    value = (
        VALUES.map(lambda one: as_json(one).decode()) | st.text(max_size=20) | st.sampled_from(["[", "{a: &x [*x]}"])
    )
    pair = st.tuples(st.sampled_from(known) | st.text(max_size=12), st.sampled_from(["=", ".x=", ""]), value)
    return st.lists(pair.map("".join), min_size=1, max_size=3), lambda given: attempt(
        lambda: load_recipe("small.yaml", given).dump()
    )


def rows() -> Surface:
    def table(separator: str) -> bytes:
        return "".join(separator.join(line) + "\n" for line in (ROW, map(str, ROW.values()))).encode()

    def parquet(value: Any) -> bytes:
        import pyarrow
        import pyarrow.parquet

        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(value), "rows")
            return Path("rows").read_bytes()
        except Exception:  # other values than Parquet can hold
            return b"PAR1"

    cases = [[ROW, {**ROW, "id": "b"}], [PAIR], [REPLY, {**REPLY, "label": 0}]]
    kinds = {".csv": broken(table(",")), ".tsv": broken(table("\t"))}
    kinds[".jsonl"] = st.one_of(*(damaged("x.jsonl", as_lines(case)) for case in cases))
    kinds[".json"] = st.one_of(*(damaged("x.json", as_json(case)) for case in cases))
    kinds[".parquet"] = st.one_of(*(broken(parquet(case)) | changed(case).map(parquet) for case in cases))
    fields = st.dictionaries(st.sampled_from(["prompt", "reference", "reasoning"]), st.sampled_from([*ROW]), max_size=2)
    choices = st.none() | st.sampled_from([*ROW, "accepted"]) | st.just(["issue", "steps"])
    options = st.fixed_dictionaries({"fields": fields, "choices": choices})
    file = st.one_of(*(st.tuples(st.just(kind), content, options) for kind, content in kinds.items()))

    def read(drawn: tuple[str, bytes, dict[str, Any]]) -> None:
        kind, content, given = drawn
        place = Path(f"odd{kind}")
        place.write_bytes(content)
        data = Data(**given)
        attempt(*(partial(read_examples, place, data, use) for use in ("sft", "plain", "heldout")))
        attempt(partial(read_pairs, str(place), data), partial(read_labels, place))
        call(["score", "small.yaml", "--replies", str(place)])

    return file, read


def arguments() -> Surface:
    files = ["small.yaml", "rows.jsonl", "replies.jsonl", "run", "absent", ".", "quickstart", "", "x" * 300]
    sets = [
        "name=x",
        "steps=[merge]",
        "seed=-1",
        "data.sft=absent.jsonl",
        "sft.rows=0",
        "model.base=absent/model",
        "a=b",
    ]
    odd = st.sampled_from(
        [*files, *sets, "--json", "--set", "--rows", "--gpu", "t4", "6GiB", "0", "-1", "1e400MiB", "--"]
    )
    word = odd | st.text(st.characters(exclude_characters="\0"), max_size=10)  # no system passes that one on
    paired = [["--set", one] for one in sets] + [["--gpu", "9" * 400 + "GiB"], ["--rows", "10" * 20], ["--by", "x"]]
    end = st.lists(st.sampled_from(paired) | word.map(lambda one: [one]), max_size=4).map(
        lambda parts: [*chain(*parts)]
    )
    starts = [
        ["validate"], ["validate", "small.yaml"], ["data", "preview"], ["data", "preview", "small.yaml"], ["lineage"],
        ["score", "small.yaml", "--replies", "replies.jsonl"], ["score"], ["plan", "small.yaml", "--gpu", "t4"],
        ["lineage", "run"], ["evaluate", "absent", "--task", "rows.jsonl"], ["chat", "absent"], ["export", "absent"],
        ["watch", "run"], ["serve", "run"],
        ["merge", "."], ["push", "run", "--to", "me/x", "--dry-run"], ["push"], ["recipes"], ["init", "quickstart"],
        ["judge", "calibrate", "small.yaml"], ["judge", "calibrate", "small.yaml", "--labels", "rows.jsonl"], ["run"],
        ["run", "absent.yaml"], ["sft", "absent.yaml"], ["pull", "no/slash/es"], [],
    ]  # fmt: skip
    for start in starts:  # imports the large libraries
        call(start)
    return st.tuples(st.sampled_from(starts), end).map(lambda drawn: drawn[0] + drawn[1]), call
