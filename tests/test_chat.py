"""The chat: history, commands, what a terminal shows; and the real one in a pseudo-terminal."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import RunWriter, evaluated_row

from qreason.cli import main
from qreason.data.prompts import HELPDESK, render
from qreason.errors import DataError, InputError, ModelError
from qreason.inference.generate import LocalGenerator
from qreason.model.resident import Resident
from qreason.recipe.sections import Data, Draw
from qreason.rewards.registry import REWARDS
from qreason.rewards.scoring import Scorer
from qreason.run.checkpoint import Checkpoint, check_target
from qreason.serve.chat import Talk
from qreason.serve.commands import COMMANDS, Ended, is_command, obey
from qreason.serve.paint import Painter, as_html
from qreason.serve.web import Desk
from qreason.types import Example, Messages, Reply, Sampling


def replies(*answers: str) -> list[Reply]:
    return [Reply(f"<reasoning>r</reasoning><answer>{text}</answer>", (1,) * (i + 1)) for i, text in enumerate(answers)]


class Speaker:
    """A generator whose reply is the question, a letter per token; it has room for prompts of `room` letters."""

    def __init__(self, room: int = 1000) -> None:
        self.room, self.asked, self.loaded = room, list[Messages](), list[Path | None]()
        self.resident = self
        self.talk: Talk | None = None
        self.stop_after = 0

    def load_adapter(self, folder: Path | None) -> None:
        if self.loaded[-1:] != [folder]:
            self.loaded.append(folder)

    def prompt_ids(self, prompts: Sequence[Messages], sampling: Sampling) -> None:
        if sum(len(message["content"]) for message in prompts[0]) > self.room:
            raise DataError("shorten it")

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def generate(self, prompts: Sequence[Messages], *, n: int, sampling: Sampling, on_tokens: Any) -> list[list[Reply]]:
        self.asked += prompts
        tokens = [ord(letter) for letter in prompts[0][-1]["content"]]
        for made in range(1, len(tokens) + 1):
            if made == self.stop_after and self.talk:
                self.talk.stop()
            on_tokens([tokens[:made]] * n)
        return [[Reply(self.text(tokens), tuple(tokens))] * n]


def talk(generator: Speaker, **options: Any) -> Talk:
    scorer = Scorer({"correctness": REWARDS["correctness"]}, {"correctness": 1.0})
    stages = {"base": None, "01-sft": Path("s"), "02-grpo": Path("g")}
    generator.talk = Talk(Checkpoint(generator, scorer, Draw(), Data(), 1, stages), **options)  # type: ignore[arg-type]
    return generator.talk


# --- turns -----------------------------------------------------------------------------------------


def test_the_model_sees_earlier_turns_unless_each_is_single() -> None:
    for single in (False, True):
        generator = Speaker()
        one = talk(generator, single=single)
        one.ask("disk full")
        one.ask("and now?")
        earlier = (("user", "disk full"), ("assistant", "disk full"))
        assert generator.asked[-1] == render(Example("", "and now?", "", history=() if single else earlier))


def test_a_reply_is_shown_as_it_grows() -> None:
    shown: list[str] = []
    assert talk(Speaker()).ask("abc", shown.append).reply.text == "abc"
    assert shown == ["a", "ab", "abc"]


def test_a_stopped_reply_ends_where_it_is_and_stays_in_the_conversation() -> None:
    generator = Speaker()
    one = talk(generator)
    generator.stop_after = 3
    answer = one.ask("abcdef")
    assert (answer.reply.text, answer.reply.finished, answer.how, answer.tokens) == ("abc", False, "stopped", 3)
    generator.stop_after = 0
    assert one.ask("next").how == "greedy"
    assert generator.asked[-1][-2] == {"role": "assistant", "content": "abc"}
    one.votes, generator.stop_after = 4, 1
    assert one.ask("abcdef").reply.text == ""


def test_the_earliest_turns_make_room_and_a_question_too_long_changes_nothing() -> None:
    one = talk(Speaker(room=len(HELPDESK) + 25))
    one.ask("a" * 10)
    assert one.ask("b" * 4).forgotten == 0
    assert one.ask("c" * 4).forgotten == 2
    before = one.history
    with pytest.raises(DataError, match="shorten it"):
        one.ask("d" * 30)
    assert one.history == before
    assert [text for _, text in before] == ["b" * 4] * 2 + ["c" * 4] * 2


# --- commands --------------------------------------------------------------------------------------


def test_another_stage_or_system_prompt_begins_a_new_conversation() -> None:
    generator = Speaker()
    one = talk(generator)
    assert one.stage == "02-grpo"
    for line, system in (("/stage base", HELPDESK), ("/system Be brief.", "Be brief."), ("/system", HELPDESK)):
        one.ask("hello")
        assert "new conversation" in obey(one, line)
        one.ask("again")
        assert [message["content"] for message in generator.asked[-1]] == [system, "again"]
    assert (generator.loaded, one.stage) == ([Path("g"), None], "base")
    assert obey(one, "/stage") == "stage base; there are base, 01-sft, 02-grpo"
    with pytest.raises(InputError, match=r"no stage '01-stf' \(did you mean '01-sft'\?\)"):
        obey(one, "/stage 01-stf")


def test_replies_are_drawn_as_commands_say() -> None:
    one = talk(Speaker())
    obey(one, "/best 8")
    assert (one.votes, one.best_of) == (None, 8)
    obey(one, "/votes 4")
    assert (one.votes, one.best_of) == (4, None)
    assert one.ask("<answer>x</answer>").how == "4 of 4 votes"
    obey(one, "/votes 1")
    assert one.ask("x").how == "greedy"
    for line in ("/votes", "/best 0", "/votes -2", "/best 99999999999999999999", "/votes ²"):
        with pytest.raises(InputError, match="a number of replies from 1 to"):
            obey(one, line)
    one = talk(Speaker(), by="correctness")
    with pytest.raises(InputError, match="needs a reference"):
        obey(one, "/best 2")


@pytest.mark.parametrize("line", ["quit", "exit", "EXIT", "/quit"])
def test_a_chat_ends_by_name(line: str) -> None:
    assert is_command(line)
    with pytest.raises(Ended, match="ended"):
        obey(talk(Speaker()), line)


def test_a_mistyped_command_names_the_nearest_and_a_path_is_a_question() -> None:
    with pytest.raises(InputError, match=r"/vote: no such command \(did you mean '/votes'\?\); /help"):
        obey(talk(Speaker()), "/vote 8")
    assert all(f"/{name}" in obey(talk(Speaker()), "/help") for name in COMMANDS)
    assert not is_command("/etc/fstab is wrong")
    assert not is_command("quit the program")


# --- what a terminal shows -------------------------------------------------------------------------

REPLY = "<reasoning>Lööked at <b>. Twice.</reasoning>\n<answer>Rest\x1b[2Jart.</answer>"


def paint(reply: str, fold: bool) -> list[tuple[str, bool]]:
    """The pieces written while a reply grows byte by byte, adjacent ones of the same kind joined."""
    written: list[tuple[str, bool]] = []

    def write(text: str, dim: bool) -> None:
        if written and written[-1][1] == dim:
            text = written.pop()[0] + text
        written.append((text, dim))

    painter, raw = Painter(write, fold=fold), reply.encode()
    for end in range(len(raw)):
        painter.show(raw[:end].decode(errors="replace"))
    painter.show(reply, last=True)
    return written


def test_reasoning_is_dim_and_no_reply_can_steer_the_terminal() -> None:
    assert paint(REPLY, fold=False) == [
        ("<reasoning>Lööked at <b>. Twice.</reasoning>", True),
        ("\n", False),
        ("<answer>", True),
        ("Rest\\x1b[2Jart.", False),
        ("</answer>", True),
    ]


def test_folded_reasoning_is_counted() -> None:
    assert paint(REPLY, fold=True)[:2] == [("[reasoning: 4 words]", True), ("\n", False)]
    assert paint("<reasoning>cut off", fold=True) == [("[reasoning: 2 words]", True)]
    assert paint("a < b <ans", fold=True) == [("a < b <ans", False)]


# --- the command -----------------------------------------------------------------------------------


def chat(*arguments: str, said: str) -> Result:
    return CliRunner().invoke(main, ["chat", "qreason/tiny", *arguments], input=said)


def test_chat_answers_each_line_as_evaluation_would_and_forgets_the_last(resident: Resident) -> None:
    result = chat("--single", said="disk full\n\nprinter offline\ndisk full\n")
    assert result.exit_code == 0, result.output
    asked = [render(Example("", text, "")) for text in ("disk full", "printer offline", "disk full")]
    greedy = LocalGenerator(resident).generate(asked, n=1, sampling=Sampling(temperature=0))
    assert result.stdout == "".join(reply.text + "\n" for (reply,) in greedy)
    assert result.stderr.count("(greedy, ") == 3


def test_chat_by_votes_says_how_many(resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(self: LocalGenerator, prompts: object, *, n: int, sampling: Sampling, **_: object) -> list[list[Reply]]:
        assert sampling.temperature > 0
        return [replies("Reboot.", "restart", "Restart", "reboot it", "restart.")[:n]]

    monkeypatch.setattr(LocalGenerator, "generate", made)
    result = chat("--votes", "5", said="broken\n")
    assert "<answer>restart</answer>" in result.stdout
    assert "(3 of 5 votes, 15 tokens)" in result.stderr
    monkeypatch.setattr(LocalGenerator, "generate", lambda *a, **k: [[Reply("no tags")] * 2])
    assert "(none of 2 replies has an answer" in chat("--votes", "2", said="broken\n").stderr


def test_chat_takes_the_likeliest_of_n_and_a_question_that_is_too_long_ends_only_its_turn() -> None:
    result = chat("--best-of", "2", said=f"{'disk full ' * 2000}\nprinter offline\n")
    assert result.exit_code == 0, result.output
    assert "shorten it" in result.stderr
    assert "(best of 2, " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--votes", "2", "--best-of", "2"), "choose one"),
        (("--best-of", "2", "--by", "rouge_l"), "--by rouge_l: rouge_l needs a reference"),
        (("--best-of", "2", "--by", "total"), "there are likelihood, format"),
        (("--best-of", "2", "--by", "judge"), "unknown ranking 'judge'"),
    ],
)
def test_a_chat_that_cannot_rank_is_bad_input(arguments: tuple[str, ...], told: str) -> None:
    result = chat(*arguments, said="x\n")
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_mistyped_folder_is_named_at_once_with_the_nearest(write_run: RunWriter) -> None:
    write_run("runs/quickstart", [[evaluated_row(0)]] * 3)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}", "utf-8")
    for mistyped in ("runs/quickstrat", "quickstart", "quickstrat"):
        with pytest.raises(ModelError, match=rf"{mistyped}: no such folder \(did you mean 'runs/quickstart'\?\)"):
            check_target(mistyped)
    with pytest.raises(ModelError, match=r"runs: neither a run folder \(no manifest.json\) nor a model's"):
        check_target("runs")
    with pytest.raises(ModelError, match="no such folder; give"):
        check_target("./nothing")
    for fine in ("qreason/tiny", "me/quickstart", "gpt2", "model"):
        check_target(fine)
    result = CliRunner().invoke(main, ["show", "runs/quickstrat"])
    assert (result.exit_code, "did you mean 'runs/quickstart'?" in result.stderr) == (2, True)


# --- in a browser ----------------------------------------------------------------------------------


def test_a_page_shows_a_reply_as_text_with_its_reasoning_folded() -> None:
    shown = as_html("a <reasoning>\n<img src=x> & so\x1b[2J\n</reasoning>\n<answer><script>b</script></answer>")
    assert shown == (
        "a <details><summary>reasoning: 4 words</summary>&lt;img src=x&gt; &amp; so\\x1b[2J</details>"
        '<span class="dim">&lt;answer&gt;</span>&lt;script&gt;b&lt;/script&gt;<span class="dim">&lt;/answer&gt;</span>'
    )
    assert as_html("<think>still") == "<details><summary>reasoning: 1 words</summary>still</details>"
    assert as_html('</think>"') == '<span class="dim">&lt;/think&gt;</span>&quot;'


def desk(generator: Speaker) -> Desk:
    return Desk(lambda: talk(generator), ("01-sft", "02-grpo"))


def test_every_side_answers_after_its_own_stage_and_remembers_until_another_one_is_chosen() -> None:
    generator = Speaker()
    both = desk(generator)
    shown = list(both.send("page", " one "))
    assert len(shown) >= 2
    assert shown[0][1] == ""  # the right side waits
    assert all("one" in text and text.endswith("(greedy, 3 tokens)</div>") for text in shown[-1])
    assert generator.loaded == [Path("s"), Path("g")]
    assert "one" in [*both.send("page", "two")][-1][0]
    assert [len(messages) for messages in generator.asked] == [2, 2, 4, 4]
    assert list(both.send("page", "  ")) == []
    assert both.restart("page", "base", "02-grpo") == ["", ""]
    list(both.send("page", "three"))
    assert generator.loaded[-2:] == [None, Path("g")]
    assert len(generator.asked[-1]) == 2
    list(both.send("another", "four"))
    assert generator.loaded[-2:] == [Path("s"), Path("g")]


def test_a_page_that_stops_makes_no_further_reply_and_an_error_ends_only_its_turn() -> None:
    generator = Speaker(room=200)
    both = desk(generator)
    sending = both.send("page", "one")
    first = next(sending)
    both.stop("page")
    assert [first, *sending][-1][1] == ""
    assert len(generator.asked) == 1
    assert [*both.send("page", "x" * 300)][-1][0].endswith("(shorten it)</div>")
    sending = both.send("page", "one")
    next(sending)
    both.restart("page", "base", "base")
    assert list(sending) == []  # what was asked before the new conversation is not shown in it


def test_without_the_extra_the_page_names_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    result = chat("--web", said="")
    assert (result.exit_code, "pip install 'qreason[web]'" in result.stderr) == (2, True)


class Terminal:
    """A program in a pseudo-terminal of 80 columns."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=take_terminal
        )
        os.close(slave)
        self.text = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, what: str, seconds: float = 120) -> str:
        """What was printed since the last time, up to and including a pattern."""
        end = time.monotonic() + seconds
        while not (found := re.search(what, self.text)):
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += re.sub(r"\x1b\[\?\d+[hl]", "", os.read(self.master, 4096).decode(errors="replace"))
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown


def take_terminal() -> None:
    """Makes the pseudo-terminal the one whose keys send signals to the program."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


SLOWLY = """
import time
from qreason.inference import decoding
draw = decoding.draw
decoding.draw = lambda *given: (time.sleep(0.2), draw(*given))[1]
from qreason.cli import main
main(["chat", "qreason/tiny"])
"""


@pytest.mark.slow
def test_the_chat_in_a_terminal_streams_remembers_stops_and_quits() -> None:
    terminal = Terminal(sys.executable, "-c", SLOWLY)
    try:
        terminal.read(r"qreason/tiny: /help lists commands[^>]*> ")
        terminal.send("disk full\n")
        terminal.read(r"disk full\r\n")
        terminal.read(r"\S")
        start = time.monotonic()
        tokens = re.search(r"greedy, (\d+)", terminal.read(r"\(greedy, \d+ tokens\)[^>]*> "))
        assert tokens
        assert time.monotonic() - start > 0.2 * (int(tokens[1]) - 3) > 0  # each took so long
        terminal.send("Repeat this: backup job, again and again\n")
        terminal.read(r"and again\r\n\S")
        terminal.send("\x03")
        terminal.read(r"\(stopped, \d+ tokens\)[^>]*> ")
        terminal.send("\x1b[A\x1b[A\n")  # arrow keys
        assert "disk full" in terminal.read(r"tokens\)[^>]*> ")
        terminal.send("\x03")
        terminal.read(r"/quit or Ctrl-D ends[^>]*> ")
        terminal.send("quit\n")
        terminal.read("ended: 'quit' by itself")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
