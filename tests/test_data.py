"""Data files: what reads, and the file and line of what does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qreason.data.examples import check_lengths, read_examples
from qreason.data.prompts import render
from qreason.errors import DataError
from qreason.recipe.sections import Data
from qreason.rewards.text import read_number
from qreason.types import Example

GSM8K = Path(__file__).parents[2] / "shared" / "benchmarks" / "gsm8k" / "test.jsonl"
ROW = {"id": "a", "issue": "printer is offline", "resolution": "Restart the spooler.", "steps": "Read the log."}


def write(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    """A JSONL file; text goes in as it stands."""
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return file


def without(key: str) -> dict[str, str]:
    return {name: value for name, value in ROW.items() if name != key}


def refused(file: Path, settings: Data | None = None, use: str = "heldout") -> str:
    with pytest.raises(DataError) as caught:
        read_examples(file, settings, use)
    return str(caught.value)


# --- what reads ----------------------------------------------------------------------------------


def test_row_becomes_an_example_that_knows_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, ROW | {"category": "printing", "split": "seen", "accepted": ["Bounce it."]})
    assert read_examples(file, use="sft") == [
        Example(
            id="a",
            prompt="printer is offline",
            reference="Restart the spooler.",
            accepted=("Bounce it.",),
            reasoning="Read the log.",
            category="printing",
            split="seen",
            source=f"{file}:1",
        )
    ]


def test_reference_comes_first_among_the_accepted_wordings(tmp_path: Path) -> None:
    accepted = ["Bounce it.", "Restart the spooler."]
    (example,) = read_examples(write(tmp_path, ROW | {"accepted": accepted}))
    assert example.references == ("Restart the spooler.", "Bounce it.")


def test_byte_order_mark_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    file = write(tmp_path, "\ufeff" + json.dumps(ROW), "", "   ", ROW | {"id": "b"})
    assert [example.source for example in read_examples(file)] == [f"{file}:1", f"{file}:4"]


def test_windows_line_ends_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b"\r\n" + json.dumps(ROW | {"id": "b"}).encode() + b"\r\n")
    assert [example.id for example in read_examples(file)] == ["a", "b"]


def test_line_separator_inside_a_text_ends_no_row(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(ROW | {"issue": "one\u2028two"}, ensure_ascii=False))
    assert read_examples(file)[0].prompt == "one\u2028two"


def test_row_without_id_is_named_after_its_line(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path, without("id")))[0].id == "rows-1"


def test_numbers_read_as_text(tmp_path: Path) -> None:
    (example,) = read_examples(write(tmp_path, {"id": 7, "question": "6 x 7?", "answer": 42}))
    assert (example.id, example.reference) == ("7", "42")


def test_gsm8k_marker_parts_working_from_answer(tmp_path: Path) -> None:
    answer = "2 + 3 = <<2+3=5>>5\nThen #### is no end.\n#### 1,005"
    (example,) = read_examples(write(tmp_path, {"question": "How many?", "answer": answer}), use="sft")
    assert example.reference == "1,005"
    assert example.reasoning == "2 + 3 = <<2+3=5>>5\nThen #### is no end."


def test_named_columns_win_over_the_usual_ones(tmp_path: Path) -> None:
    file = write(tmp_path, ROW | {"ticket": "screen is dark", "cure": ["Plug it in."]})
    (example,) = read_examples(file, Data(fields={"prompt": "ticket", "accepted": "cure"}))
    assert example.prompt == "screen is dark"
    assert example.accepted == ("Plug it in.",)


@pytest.mark.skipif(not GSM8K.exists(), reason="shared/benchmarks/gsm8k lies beside the checkout of the authors only")
def test_gsm8k_reads_whole_and_every_answer_is_a_number() -> None:
    examples = read_examples(GSM8K, use="sft")
    assert len(examples) == 1319
    assert all(read_number(example.reference) is not None for example in examples)
    assert not any("####" in f"{example.reasoning}{example.reference}" for example in examples)


def test_csv_reads_and_names_the_line(tmp_path: Path, tables: None) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("id,question,answer\n1,Six times seven?,42\n2,Six times eight?,48\n", "utf-8")
    first, second = read_examples(file)
    assert (first.id, first.prompt, first.reference) == ("1", "Six times seven?", "42")
    assert second.source == f"{file}:3"


def test_csv_error_names_the_line(tmp_path: Path, tables: None) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\nSix times seven?,forty-two\nSix times eight?,\n", "utf-8")
    assert refused(file).startswith(f"{file}:3: 'answer' is empty")


def test_parquet_reads_like_jsonl(tmp_path: Path, tables: None) -> None:
    from datasets import Dataset

    file = tmp_path / "rows.parquet"
    Dataset.from_list([ROW | {"accepted": ["Bounce it."]}]).to_parquet(file)
    (table,), (lines,) = read_examples(file), read_examples(write(tmp_path, ROW | {"accepted": ["Bounce it."]}))
    assert (table.id, table.prompt, table.references) == (lines.id, lines.prompt, lines.references)


def test_table_that_cannot_be_loaded_names_the_file(tmp_path: Path, tables: None) -> None:
    file = tmp_path / "rows.parquet"
    file.write_text("no parquet", "utf-8")
    assert refused(file).startswith(f"{file}: cannot be loaded")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` with its cache in the test's own folder."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ('{"id": "b", "issue": ', "not JSON at column"),
        ("printer is offline", "not JSON at column 1"),
        ("[1, 2]", "not an object"),
        (without("issue"), "no prompt: the row has no column 'issue' or 'prompt' or 'question'"),
        (without("resolution"), "no reference: the row has no column 'resolution'"),
        (ROW | {"id": "b", "issue": "  "}, "'issue' is empty"),
        (ROW | {"id": "b", "resolution": None}, "'resolution' is empty"),
        (ROW | {"id": "b", "issue": ["a"]}, "'issue' is list, not text"),
        (ROW | {"id": "b", "resolution": True}, "'resolution' is bool, not text"),
        (ROW | {"id": "b", "steps": {"a": 1}}, "'steps' is dict, not text"),
        (ROW | {"id": "b", "accepted": "Bounce it."}, "'accepted' must be a list of texts"),
        (ROW | {"id": "b", "accepted": [1]}, "'accepted' must be a list of texts"),
    ],
)
def test_row_that_cannot_be_used_is_named_by_file_and_line(tmp_path: Path, second: object, said: str) -> None:
    file = write(tmp_path, ROW, second)
    message = refused(file)
    assert message.startswith(f"{file}:2: ")
    assert said in message


def test_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    file = write(tmp_path, ROW, ROW | {"id": "b"}, ROW)
    assert refused(file) == f"{file}:3: id 'a' was used at {file}:1; ids must be unique"


def test_sft_needs_reasoning_and_other_uses_do_not(tmp_path: Path) -> None:
    file = write(tmp_path, without("steps"))
    assert refused(file, use="sft").startswith(f"{file}:1: no reasoning")
    assert read_examples(file, use="prompts")


def test_column_named_in_fields_must_be_there(tmp_path: Path) -> None:
    file = write(tmp_path, ROW)
    assert refused(file, Data(fields={"prompt": "ticket"})).startswith(
        f"{file}:1: no prompt: the row has no column tick"
    )


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff"])
def test_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, "utf-8")
    assert refused(file).startswith(f"{file}: no rows")


def test_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b'\n{"id": "b", "issue": "Dr\xfccker"}\n')
    assert refused(file).startswith(f"{file}:2: not UTF-8")


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone.jsonl").startswith(f"{tmp_path / 'gone.jsonl'}: No such file")


def test_row_longer_than_the_context_is_named_by_file_and_line(tmp_path: Path) -> None:
    examples = read_examples(write(tmp_path, ROW, ROW | {"id": "b"}))
    check_lengths([8, 8], examples, 8, "the base's context of 8")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 9 tokens, but the base's context of 8 leaves 8; shorten"):
        check_lengths([8, 9], examples, 8, "the base's context of 8")


def test_plain_row_is_asked_without_a_system_prompt() -> None:
    plain = Example("x", "Name a town.", "Berlin.", plain=True)
    assert render(plain) == [{"role": "user", "content": "Name a town."}]
    assert [message["role"] for message in render(replace(plain, plain=False))] == ["system", "user"]
