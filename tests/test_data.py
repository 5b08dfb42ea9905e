"""Data files: what reads, and the file and line of what does not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import RecipeWriter

from qreason.cli import main
from qreason.data.examples import check_lengths, read_examples, to_example
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


@pytest.mark.parametrize(
    ("reasoning", "answer"),
    [
        ("2 + 2 = 4", "<answer>4</answer>"),
        ("<reasoning>2 + 2 = 4</reasoning>", "4"),
        ("<think>\n2 + 2 = 4\n</think>\n", " <answer>\n4</answer>\n"),
        (None, "<think>2 + 2 = 4</think>\n4"),
        (None, "<reasoning>2 + 2 = 4</reasoning><answer>4</answer>"),
    ],
)
def test_columns_may_have_the_tags_that_training_writes_around_them(
    tmp_path: Path, reasoning: str | None, answer: str
) -> None:
    # They were trained with two of each, and no answer was ever right.
    (row,) = read_examples(write(tmp_path, {"question": "2 + 2?", "reasoning": reasoning, "answer": answer}), use="sft")
    assert (row.reasoning, row.reference, row.plain) == ("2 + 2 = 4", "4", False)


def test_number_beyond_all_floats_reads_as_text(tmp_path: Path) -> None:
    file = write(tmp_path, ROW | {"resolution": 10**400})  # was a traceback
    assert read_examples(file)[0].reference == f"1{'0' * 400}"


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


@pytest.mark.parametrize(
    "cell", ["02201", "True", "NA", "None", "null", "1e400", "4", "10000000000000001", "6.50", " x "]
)
@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ","), ("rows.TSV", "\t")])
def test_cell_of_a_table_is_text_as_written(tmp_path: Path, name: str, mark: str, cell: str) -> None:
    # A whole column was read as numbers, booleans or missing values: 02201 became 2201, NA an empty cell.
    file = tmp_path / name
    file.write_text(f"id{mark}question{mark}answer\n{cell}{mark}What?{mark}{cell}\n", "utf-8")
    (example,) = read_examples(file)
    assert (example.id, example.reference) == (cell, cell)


def test_quoted_cell_keeps_its_lines_and_the_next_row_its_own(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('question,answer\r\n"a\nb, c",d\r\n\r\ne,\r\n', "utf-8-sig")
    assert refused(file).startswith(f"{file}:5: 'answer' is empty")
    file.write_text('question,answer,\n"a\nb, c",d\ne,f,\n', "utf-8-sig")
    assert [(one.prompt, one.source) for one in read_examples(file)] == [("a\nb, c", f"{file}:2"), ("e", f"{file}:4")]


@pytest.mark.parametrize(
    ("name", "raw", "line", "said"),
    [
        ("semi.csv", b"question;answer\nWie viel?;2,50\n", 1, "separated by semicolons, not by commas"),
        ("tab.csv", b"question\tanswer\na\tb\n", 1, "separated by tabs, not by commas; name it .tsv"),
        ("comma.tsv", b"question,answer\na,b\n", 1, "separated by commas, not by tabs"),
        ("latin.csv", "question,answer\nGröße?,5\n".encode("cp1252"), 2, "not UTF-8 (perhaps Windows-1252)"),
        ("wide.csv", "question,answer\na,b\n".encode("utf-16"), 1, "not UTF-8 (UTF-16)"),
        ("more.csv", b"question,answer\na,b\nc,d,e\n", 3, "3 cells, but the first line names 2 columns"),
        ("open.csv", b'question,answer\na,b\n"c,d\n', 3, "is a quote missing"),
        ("twice.csv", b"question,answer,answer\na,b,c\n", 1, "two columns are called 'answer'"),
        ("list.json", b'[{"question": "a", "answer": "b"},\n {"question": "c"', 2, "not JSON"),
        ("open.json", b'[{"question": "a", "answer": "b"}\n', 2, "the list has no end"),
        ("plain.json", b'[\n"a"]', 2, "not an object"),
        ("nan.jsonl", b'\n{"question": "a", "answer": NaN}', 2, "NaN is not a finite number"),
        ("large.jsonl", b'{"question": "a", "answer": 1e400}', 1, "1e400 is not a finite number"),
        ("digits.jsonl", b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", 1, "Exceeds the limit"),
        ("half.jsonl", b'{"question": "a", "answer": "\\ud800"}', 1, "half of a surrogate pair"),
        ("deep.jsonl", b"[" * 20_000, 1, "nested too deeply"),
        ("two.jsonl", b'{"question": "a", "answer": "b"} {}', 1, "not JSON at column 33: extra data"),
    ],
)
def test_what_a_file_does_not_hold_is_named_by_line_with_its_cure(
    tmp_path: Path, name: str, raw: bytes, line: int, said: str
) -> None:
    file = tmp_path / name
    file.write_bytes(raw)
    message = refused(file)
    assert message.startswith(f"{file}:{line}: ")
    assert said in message


@pytest.mark.parametrize("text", ["[{0},\n{1}]", "{0}\n{1}", "\ufeff[{0}, {1}]\n"])
def test_json_file_is_a_list_of_rows_with_their_lines(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.JSON"
    file.write_text(text.replace("{0}", json.dumps(ROW)).replace("{1}", json.dumps(ROW | {"id": "b"})), "utf-8")
    assert [example.id for example in read_examples(file)] == ["a", "b"]
    assert read_examples(file)[1].source == f"{file}:{2 if chr(10) in text[:-1] else 1}"


@pytest.mark.parametrize("name", ["rows.txt", "rows.xlsx", "a/b/rows", "gone.jsonl.gz", "my rows", "C:\\rows"])
def test_path_is_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused(Path(name)).startswith(f"{name}: a data file ends with .jsonl, .json, .csv, .tsv, .parquet")


def test_number_of_a_table_that_is_not_finite_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x:1: 'answer' is float, not text"):
        to_example({"question": "a", "answer": float("nan")}, {}, "x:1")


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
        (ROW | {"id": "b", "resolution": "They share 12 / 4. #### "}, "'resolution' has no answer after ####"),
        (ROW | {"id": "b", "resolution": "<answer> </answer>"}, "'resolution' has no answer after #### or in its tags"),
        (ROW | {"id": "b", "steps": "a</reasoning><answer>b</answer>"}, "</answer> inside its reasoning or its answer"),
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


def test_row_without_reasoning_is_plain_in_sft_and_asked_for_it_elsewhere(tmp_path: Path) -> None:
    file = write(tmp_path, without("steps"), ROW | {"id": "b"}, ROW | {"id": "c", "steps": " "})
    assert [row.plain for row in read_examples(file, use="sft")] == [True, False, True]
    assert [row.plain for row in read_examples(file, use="prompts")] == [False, False, False]


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


def test_no_row_can_steer_the_terminal(write_recipe: RecipeWriter, workplace: Path) -> None:
    recipe = write_recipe()
    row = ROW | {"id": "\x1b]0;a\x07", "issue": "\x1b[2Jprinter"}
    write(workplace, row, name="sft.jsonl")
    shown = CliRunner().invoke(main, ["data", "preview", str(recipe)], color=True)
    assert "\\x1b[2Jprinter" in shown.stdout
    write(workplace, row, row, name="sft.jsonl")
    named = CliRunner().invoke(main, ["validate", str(recipe)], color=True)
    assert "id '\\x1b]0;a\\x07' was used at" in named.stderr
    assert "\x1b" not in shown.stdout + named.stderr
