"""Data as others have them: every form reaches examples, a recipe and the loss; the rest is named by file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qreason.cli import main
from qreason.cli.starting import look, source_for
from qreason.data.chats import read_chat, read_reply
from qreason.data.examples import choose_prompt, describe, read_examples
from qreason.data.prompts import lesson, render, system_prompt
from qreason.data.turns import mask_turns
from qreason.errors import DataError, InputError
from qreason.model.load import EMBEDDED
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Data
from qreason.rewards.tags import answer_of
from qreason.types import Example, Reply

FILES = Path(__file__).parent / "fixtures" / "data"
TINY = EMBEDDED["qreason/tiny"]
FOUND = {
    "FAQ.CSV": "3 rows, no reasoning",
    "alpaca.json": "4 rows (Alpaca), no reasoning",
    "completions.jsonl": "3 rows (prompt/completion), no reasoning",
    "export.csv": "3 chats (ShareGPT), 1.3 turns on average, no reasoning",
    "fragen.csv": "3 rows, all with reasoning",
    "sharegpt.json": "3 chats (ShareGPT), 1.3 turns on average, no reasoning",
    "sums.tsv": "3 rows, all with reasoning",
    "support.jsonl": "4 chats (messages), 1.5 turns on average, no reasoning",
    "thinking.jsonl": "3 chats (messages), 1 turn on average, all with reasoning",
    "turns.parquet": "3 rows (prompt/completion), 1.3 turns on average, no reasoning",
}
"""Files as their users make them -> what is said of them."""
TALK = [("user", "Is 9 prime?"), ("assistant", "No."), ("user", "And 7?"), ("assistant", "Yes.")]


def qreason(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / name


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def weighted(*weights: object) -> dict[str, Any]:
    """TALK with weights of the assistant's turns, as in OpenAI's fine-tuning files."""
    row = chat(*TALK)
    for message, weight in zip(row["messages"][1::2], weights, strict=True):
        message["weight"] = weight
    return row


ALPACA = {"instruction": "And 7?", "input": "", "output": "Yes."}


# --- recognized ----------------------------------------------------------------------------------


def test_every_file_is_there() -> None:
    assert {file.name for file in FILES.iterdir()} == set(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_file_of_each_kind_gets_a_recipe_that_validates_and_says_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(FILES / name, tmp_path)
    written = qreason("init", "--from", name)
    assert written.exit_code == 0, written.output
    recipe = tmp_path / written.stdout.strip()
    assert FOUND[name] in recipe.read_text("utf-8").splitlines()[0]
    told = qreason("validate", recipe)
    assert told.exit_code == 0, told.output
    data = load_recipe(recipe).data
    sides = [read_examples(tmp_path / name, data, use) for use in ("sft", "heldout")]
    assert all(sides)
    assert all(f"{use}: {describe(rows)}" in told.stdout for use, rows in zip(("sft", "heldout"), sides, strict=True))
    assert describe([*sides[0], *sides[1]]) == FOUND[name]
    assert all(row.plain == (row.reasoning is None) for rows in sides for row in rows)


@pytest.mark.parametrize(
    ("row", "prompt", "reference", "history"),
    [
        (chat(*TALK), "And 7?", "Yes.", ("Is 9 prime?", "No.")),
        (chat(*TALK, ("user", "Thanks")), "And 7?", "Yes.", ("Is 9 prime?", "No.")),
        (chat(("user", [{"type": "text", "text": "Hi"}]), ("assistant", "Hello")), "Hi", "Hello", ()),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a", "b", ()),
        ({"conversations": '[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]'}, "a", "b", ()),
        ({"prompt": "a", "completion": "b"}, "a", "b", ()),
        ({"prompt": '[{"a": 1}]', "completion": "b"}, '[{"a": 1}]', "b", ()),
        ({"prompt": chat(*TALK[:3])["messages"], "completion": "b"}, "And 7?", "b", ("Is 9 prime?", "No.")),
        ({"instruction": "a", "input": " ", "output": "b"}, "a", "b", ()),
        ({"instruction": "a", "input": "c", "output": "#### b"}, "a\n\nc", "#### b", ()),
        (ALPACA | {"history": [["Is 9 prime?", "No."]]}, "And 7?", "Yes.", ("Is 9 prime?", "No.")),
        (ALPACA | {"history": '[["Is 9 prime?", "No."]]'}, "And 7?", "Yes.", ("Is 9 prime?", "No.")),
        (ALPACA | {"history": []}, "And 7?", "Yes.", ()),
        (ALPACA | {"history": ""}, "And 7?", "Yes.", ()),
        (weighted(1, 0), "Is 9 prime?", "No.", ()),
        (chat(*TALK) | {"tools": []}, "And 7?", "Yes.", ("Is 9 prime?", "No.")),
    ],
)
def test_last_assistant_turn_is_the_reference_and_all_before_it_the_prompt(
    tmp_path: Path, row: dict[str, Any], prompt: str, reference: str, history: tuple[str, ...]
) -> None:
    (example,) = read_examples(write(tmp_path, row))
    assert (example.prompt, example.reference, example.reasoning) == (prompt, reference, None)
    assert tuple(text for _, text in example.history) == history


def test_columns_are_found_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_text("Question ,Response\nIs 7 prime?,Yes.\n", "utf-8")
    (row,) = read_examples(tmp_path / "faq.csv")
    assert (row.prompt, row.reference) == ("Is 7 prime?", "Yes.")
    named = write(tmp_path, {"Question": "a", "question": "b", "Answer": "c", "answer": "d"})
    (row,) = read_examples(named, Data(fields={"prompt": "Question"}))
    assert (row.prompt, row.reference) == ("a", "d")


@pytest.mark.parametrize("names", [("instruction", "context", "response"), ("Instruction", "Input", "Output")])
def test_instructions_of_other_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Those of Dolly, and in capitals."""
    (row,) = read_examples(write(tmp_path, dict(zip(names, ("Sum up.", "a b", "ab"), strict=True))))
    assert (row.prompt, row.reference, row.form) == ("Sum up.\n\na b", "ab", "Alpaca")


def test_input_of_an_instruction_is_kept_where_fields_name_its_column(tmp_path: Path) -> None:
    # The input was dropped without a word: two equal prompts with different answers.
    file = write(tmp_path, {"instruction": "Translate.", "input": "good night", "output": "Gute Nacht"})
    data = Data(fields={"prompt": "instruction", "reference": "output"})
    assert read_examples(file, data)[0].prompt == "Translate.\n\ngood night"


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\n6 x 7\n</think>\n\n42", "6 x 7", "42"),
        ("<reasoning>6 x 7</reasoning>\n<answer>42</answer>", "6 x 7", "42"),
        ("<think>\n\n</think>\n\n42", None, "42"),
        ("42 <think>not at the start</think>", None, "42 <think>not at the start</think>"),
        ("<think>nothing after it</think>", None, "<think>nothing after it</think>"),
    ],
)
def test_thoughts_at_the_beginning_of_a_reply_are_its_reasoning(text: str, reasoning: str | None, answer: str) -> None:
    turn = read_reply(text)
    assert (turn.reasoning, turn.text) == (reasoning, answer)


def test_earlier_turns_with_thoughts_read_as_the_model_writes_them(tmp_path: Path) -> None:
    file = write(tmp_path, chat(("user", "a"), ("assistant", "<think>b</think>c"), *TALK[2:]))
    assert read_examples(file)[0].history[1] == ("assistant", "<reasoning>b</reasoning>\n<answer>c</answer>")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (chat(("user", "a"), ("tool", "b")), "turn 2: role is 'tool'; there are system, user, human, assistant, gpt"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "turn 2 is of the user, but user and assistant take"),
        (chat(("assistant", "a"), ("user", "b"), ("assistant", "c")), "turn 1 is of the assistant"),
        (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "turn 2 is of the system"),
        (weighted(0, 0), "every turn of the assistant has weight 0; remove the row"),
        (weighted(1, 0.5), "turn 4: weight is 0.5; write 1, or 0 for a turn that is not learned"),
        (chat(*TALK[:3]) | {"tools": [{"type": "function"}]}, "'tools' offers tools, which qreason does not render"),
        (
            {
                "messages": [
                    chat(*TALK)["messages"][0],
                    {"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]},
                ]
            },
            "turn 2: 'tool_calls' calls tools, which qreason does not train; remove the row",
        ),
        (ALPACA | {"history": "Is 9 prime?"}, "'history' is no list of [question, answer] pairs"),
        (ALPACA | {"history": [["a", "b", "c"]]}, "'history' is no list of [question, answer] pairs"),
        (ALPACA | {"history": [["a", ""]]}, "history: content is empty"),
        (chat(("system", "a"), ("user", "b")), "no turn of the assistant"),
        (chat(("user", ""), ("assistant", "b")), "turn 1: content is empty"),
        (chat(("user", "a"), ("assistant", None)), "turn 2: content is empty"),
        (chat(("user", [{"type": "image"}]), ("assistant", "b")), "turn 1: content is not text"),
        (chat(("user", [{"type": "text"}]), ("assistant", "b")), "turn 1: content is not text"),  # was the word None
        ({"messages": "hello"}, "'messages' is text, but no JSON list of messages"),
        ({"messages": 3}, "'messages' is int, not a list of messages"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "turn 1: role is ['user']"),
        ({"conversations": '[{"from": "human", "value": "\\ud800"}]'}, "'conversations' is text, but no JSON list"),
        ({"messages": ["hello"]}, "turn 1: str, not a message"),
        ({"conversations": "[{'from': 'human'}]"}, "'conversations' is text, but no JSON list"),
        ({"prompt": "a", "completion": 3}, "completion"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' is int, not text"),
        ({"system": ["a"], "prompt": "a", "completion": "b"}, "'system' is list, not text"),
    ],
)
def test_chat_that_cannot_be_used_is_named_by_file_line_and_turn(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    file = write(tmp_path, chat(*TALK), row)
    if row == {"prompt": "a", "completion": 3}:  # a number is a text, as in qreason's own columns
        assert read_examples(file)[1].reference == "3"
        return
    with pytest.raises(DataError) as caught:
        read_examples(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert said in str(caught.value)


# --- system prompts ------------------------------------------------------------------------------


def test_system_message_of_a_row_wins_over_that_of_the_data(tmp_path: Path) -> None:
    own, column = chat(("system", "Be kind."), *TALK[:2]), {"prompt": "a", "completion": "b", "system": "Be brief."}
    rows = read_examples(write(tmp_path, own, column, chat(*TALK[:2])), Data(system="Be exact."))
    assert [render(row, "unused")[0] for row in rows] == [
        {"role": "system", "content": text} for text in ("Be kind.", "Be brief.", "Be exact.")
    ]


@pytest.mark.parametrize(
    ("row", "data", "prompt"),
    [
        ({"issue": "a", "resolution": "b"}, {}, "helpdesk"),
        ({"question": "a", "answer": "b"}, {}, "none"),
        ({"question": "a", "answer": "b", "steps": "c"}, {}, "general"),
        ({"question": "a", "answer": "b", "steps": "c"}, {"prompt": "math"}, "math"),
        ({"question": "a", "choices": ["b", "c"], "answer": 0}, {"choices": "choices"}, "choice"),
        (chat(*TALK), {}, "none"),
        (chat(("user", "a"), ("assistant", "<think>b</think>c")), {}, "general"),
        (chat(*TALK), {"system": "Be brief."}, None),
    ],
)
def test_shipped_prompt_is_chosen_by_the_rows(
    tmp_path: Path, row: dict[str, Any], data: dict[str, Any], prompt: str | None
) -> None:
    assert choose_prompt(Data(sft=str(write(tmp_path, row)), **data)).prompt == prompt


def test_prompts_without_training_rows_are_asked_for_reasoning(tmp_path: Path) -> None:
    # R1-Zero: nothing is taught, and its questions have no reasoning.
    data = choose_prompt(Data(prompts=str(write(tmp_path, {"question": "a", "answer": "b"}))))
    assert data.prompt == "general"
    assert "<reasoning>" in system_prompt(data)


def test_rows_that_are_asked_for_no_reasoning_are_plain(tmp_path: Path) -> None:
    file = write(tmp_path, {"question": "a", "answer": "b"})
    (row,) = read_examples(file, Data(prompt="none"))
    assert render(row, system_prompt(Data(prompt="none"))) == [{"role": "user", "content": "a"}]
    assert answer_of(Reply(" b "), row) == "b"
    assert answer_of(Reply("b"), Example("", "a", "b")) == ""


def test_own_text_and_shipped_prompt_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt and system: both give a system prompt"):
        Data(prompt="math", system="Be brief.")
    with pytest.raises(InputError, match=r"data\.system: a system prompt of your own has no version without"):
        system_prompt(Data(system="Be brief."), direct=True)


# --- what the loss covers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from qreason.model.load import load_tokenizer

    return load_tokenizer("qreason/tiny")


def covered(tokenizer: Any, row: dict[str, list[int]]) -> str:
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    return str(tokenizer.decode([token for token, learned in pairs if learned]))


def test_loss_covers_every_turn_of_the_assistant_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    (example,) = read_examples(write(tmp_path, chat(("system", "Be brief."), *TALK)), use="sft")
    row = mask_turns(tokenizer, lesson(example, ""), example.source)
    assert covered(tokenizer, row) == "No.<|im_end|>\nYes.<|im_end|>\n"


def test_a_turn_of_weight_0_is_read_and_not_learned(tokenizer: Any, tmp_path: Path) -> None:
    from qreason.cli.preview import render_parts
    from qreason.recipe.training import Sft
    from qreason.stages.sft import training_rows

    (example,) = examples = read_examples(write(tmp_path, weighted(0, 1)), use="sft")
    (row,) = training_rows(Sft(), tokenizer, examples, "")
    assert covered(tokenizer, row) == "Yes.<|im_end|>\n"
    assert "No." in tokenizer.decode(row["input_ids"])
    recipe = load_recipe("quickstart")
    shown = render_parts(tokenizer, example, recipe, "sft")
    assert shown[1::2] == ["Yes.<|im_end|>\n"]
    (row,) = training_rows(Sft(), tokenizer, read_examples(write(tmp_path, weighted(1, None)), use="sft"), "")
    assert covered(tokenizer, row) == "No.<|im_end|>\nYes.<|im_end|>\n"


@pytest.mark.parametrize("row", [chat(*TALK), ALPACA, {"prompt": "a", "completion": "b"}])
@pytest.mark.parametrize("choices", ["choices", ("right", "wrong")])
def test_choices_of_a_row_of_another_form_are_refused(tmp_path: Path, row: dict[str, Any], choices: Any) -> None:
    # They were left out: the rows were trained as if data.choices were not there.
    file = write(tmp_path, row | {"choices": ["b", "c"], "right": "b", "wrong": "c"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: a row of the form .* has no choices for data.choices; give"):
        read_examples(file, Data(choices=choices))


def test_mask_of_a_chat_of_one_turn_is_that_of_trl(tokenizer: Any) -> None:
    messages = lesson(Example("", "Is 9 prime?", "\nNo.", plain=True), "")
    row = mask_turns(tokenizer, messages, "x:1")
    before = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    same = next(at for at, (one, two) in enumerate(zip([*before, -1], whole, strict=False)) if one != two)
    assert row == {"input_ids": whole, "completion_mask": [int(at >= same) for at in range(len(whole))]}


def test_template_that_changes_earlier_turns_is_refused(tokenizer: Any) -> None:
    from copy import deepcopy

    changing = deepcopy(tokenizer)
    changing.chat_template = tokenizer.chat_template.replace(
        "message['content']",
        "(message['content'] | upper if message['role'] == 'assistant' and not loop.last else message['content'])",
    )
    messages = [{"role": role, "content": text} for role, text in TALK]
    with pytest.raises(DataError, match=r"rows.jsonl:3: .* renders turn 2 in another way .* set sft.turns: last"):
        mask_turns(changing, messages, "rows.jsonl:3")
    mask_turns(changing, messages[:1] + messages[-1:], "rows.jsonl:3")  # a single turn


def test_only_the_last_turn_is_learned_where_the_recipe_says_so(tokenizer: Any, tmp_path: Path) -> None:
    from qreason.recipe.training import Sft
    from qreason.stages.sft import training_rows

    examples = read_examples(write(tmp_path, chat(*TALK)), use="sft")
    (row,) = training_rows(Sft(turns="last"), tokenizer, examples, "")
    assert row["completion"] == [{"role": "assistant", "content": "Yes."}]
    assert [message["content"] for message in row["prompt"]] == ["Is 9 prime?", "No.", "And 7?"]
    (row,) = training_rows(Sft(), tokenizer, examples, "")
    assert covered(tokenizer, row).startswith("No.")


# --- held-out rows -------------------------------------------------------------------------------


def test_held_out_rows_are_the_same_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    rows = [chat(("user", f"question {number}"), ("assistant", "yes")) for number in range(60)]
    rows.append(chat(("user", "question 3"), ("assistant", "no"), *TALK))  # begins like another one

    def sides(count: int) -> list[set[str]]:
        file = str(write(tmp_path, *rows[:count], name="many.jsonl"))
        data = Data(sft=file, heldout=file, heldout_share=0.2)
        found = [read_examples(file, data, use) for use in ("sft", "heldout")]
        return [{row.history[0][1] if row.history else row.prompt for row in side} for side in found]

    (trained, held), (fewer, some) = sides(61), sides(30)
    assert len(trained) + len(held) == 60
    assert not trained & held
    assert 5 < len(held) < 20
    assert fewer < trained
    assert some < held


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_both_sides_have_a_row(tmp_path: Path, share: float) -> None:
    file = str(write(tmp_path, *({"question": str(number), "answer": "a"} for number in range(3))))
    data = Data(sft=file, heldout=file, heldout_share=share)
    assert sorted(len(read_examples(file, data, use)) for use in ("sft", "heldout")) == [1, 2]


def test_rows_that_begin_alike_cannot_be_parted(tmp_path: Path) -> None:
    file = str(write(tmp_path, *({"id": str(n), "question": "a", "answer": "b"} for n in range(3))))
    with pytest.raises(DataError, match="all rows begin alike"):
        read_examples(file, Data(sft=file, heldout=file, heldout_share=0.1), "sft")


def test_share_without_a_common_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.heldout must be the file of data\.sft"):
        Data(sft="a.jsonl", heldout="b.jsonl", heldout_share=0.1)


# --- init ----------------------------------------------------------------------------------------


def test_init_names_what_a_table_needs(tmp_path: Path) -> None:
    assert qreason("init", "--from", FILES / "fragen.csv", "--to", tmp_path / "new").exit_code == 0
    data = load_recipe(tmp_path / "new" / "fragen.yaml").data
    assert (data.encoding, data.separator, data.prompt) == ("cp1252", ";", "general")


@pytest.mark.parametrize(
    ("name", "said"), [("fragen.csv", "data.encoding: cp1252"), ("semi.csv", "data.separator: ';'")]
)
def test_table_that_needs_an_option_names_it(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "semi.csv").write_text("question;answer\nWie viel?;2,50\n", "utf-8")
    with pytest.raises(DataError, match=said):
        read_examples((tmp_path if name == "semi.csv" else FILES) / name)


def test_init_of_a_file_on_another_drive_names_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def relpath(path: str, start: str) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")  # was a traceback

    file = write(tmp_path, chat(*TALK))
    monkeypatch.setattr("os.path.relpath", relpath)
    assert source_for(str(file), tmp_path) == str(file)


def test_init_replaces_a_recipe_only_by_force(tmp_path: Path) -> None:
    arguments = ("init", "--from", FILES / "alpaca.json", "--to", tmp_path)
    assert qreason(*arguments).exit_code == 0
    (tmp_path / "alpaca.yaml").write_text("mine")
    again = qreason(*arguments)
    assert again.exit_code == 2
    assert "alpaca.yaml already exists" in again.stderr
    assert (tmp_path / "alpaca.yaml").read_text() == "mine"
    assert qreason(*arguments, "--force", "--model", "Qwen/Qwen2.5-0.5B-Instruct").exit_code == 0
    assert load_recipe(tmp_path / "alpaca.yaml").model.base == "Qwen/Qwen2.5-0.5B-Instruct"


def test_init_reads_a_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = json.loads((FILES / "alpaca.json").read_text("utf-8"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, split: asked.append((*given, split)) or rows)
    assert qreason("init", "--from", "tatsu-lab/alpaca", "--to", tmp_path).exit_code == 0
    assert set(asked) == {("tatsu-lab/alpaca", None, "train")}
    data = load_recipe(tmp_path / "alpaca.yaml").data
    assert (data.sft, data.heldout, data.splits) == ("tatsu-lab/alpaca", "tatsu-lab/alpaca", {"heldout": "train"})


def test_init_of_rows_that_cannot_be_used_writes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path, {"frage": "a", "antwort": "b"})
    told = qreason("init", "--from", file, "--to", tmp_path)
    assert told.exit_code == 2
    assert "name yours in data.fields" in told.stderr
    assert not (tmp_path / "rows.yaml").exists()


@pytest.mark.parametrize(
    ("row", "cure"),
    [
        (
            {"dialog": chat(*TALK)["messages"], "title": "a"},
            "its column 'dialog' holds a chat: rename it to 'messages'",
        ),
        ({"dialog": json.dumps(chat(*TALK)["messages"])}, "its column 'dialog' holds a chat: rename it to 'messages'"),
        ({"turns": ["a", "b"], "split": "x"}, "add it, as text"),
        ({"question": "a", "answers": ["b"]}, "add it, as text"),
        ({"frage": "a", "antwort": "b", "n": [1]}, "add it, or name yours in data.fields ('frage' or 'antwort')"),
        (
            {"Frage": "a", " Antwort": "b", "Answer": "c"},
            "add it, or name yours in data.fields ('Frage' or ' Antwort')",
        ),
        ({"Dialog": chat(*TALK)["messages"]}, "its column 'Dialog' holds a chat: rename it to 'messages'"),
    ],
)
def test_data_fields_are_recommended_for_columns_only_that_they_take(
    tmp_path: Path, row: dict[str, Any], cure: str
) -> None:
    told = qreason("init", "--from", write(tmp_path, row), "--to", tmp_path)
    assert told.exit_code == 2
    assert told.stderr.strip().endswith(f"; {cure}")


def test_found_rows_are_those_that_the_recipe_reads() -> None:
    found = look(str(FILES / "support.jsonl"))
    assert len(found.training) + len(found.heldout) == 4
    assert read_chat({"question": "a", "answer": "b"}, {}, "x:1").form == ""


# --- what will not export ------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("validate",), ("plan", "--gpu", "t4")])
def test_architecture_that_will_not_export_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(TINY, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
    }
    (base / "config.json").write_text(json.dumps(config))
    recipe = Path(qreason("init", "--from", FILES / "sums.tsv", "--model", base).stdout.strip())
    assert qreason(command[0], recipe, *command[1:]).exit_code == 0
    recipe.write_text(recipe.read_text().replace("  - merge\n", "  - merge\n  - export\n"))
    told = qreason(command[0], recipe, *command[1:])
    assert told.exit_code == 2
    assert "a olmo2 model; export writes" in told.stderr
