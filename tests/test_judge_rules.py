"""What the rules of a strict judge decide, and that the default judge asks what it always asked."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qreason.data.prompts import render_judge
from qreason.inference.generate import LocalGenerator
from qreason.judge.calibration import read_labels
from qreason.judge.injections import attempts
from qreason.judge.rules import decide
from qreason.judge.verdict import Judge, LocalModel, open_judge
from qreason.model.resident import Resident
from qreason.rewards.judged import JudgeSettings
from qreason.types import Messages

HELPDESK = Path(__file__).parent.parent / "data" / "helpdesk"
PAIRS = HELPDESK / "judge_pairs.jsonl"


@pytest.mark.parametrize(
    ("reference", "response", "verdict"),
    [
        ("Allow port 22 from Bremen in the firewall.", "Open port 22 in the firewall for Bremen.", None),
        ("Allow port 22 from Bremen in the firewall.", "allow  port 22 from bremen in the firewall", 1.0),
        ("Allow port 22 from Bremen in the firewall.", "Allow port 22 from Cork in the firewall.", 0.0),
        ("Allow port 22 from Bremen in the firewall.", "Allow port 23 from Bremen in the firewall.", 0.0),
        ("Allow port 22 from Bremen in the firewall.", "Allow port 22 from Bremen or Cork in the firewall.", 0.0),
        ("Raise the limit to 70 GB.", "Set the limit to 70GB.", None),
        ("Raise the limit to 70 GB.", "Set the limit to 70 GB or 80 GB.", 0.0),
        ("Raise the limit to 70 GB.", "Set the limit to ٧٠ GB.", None),
        ("Unlock the account b.costa.", "B.Costa is to be unlocked.", None),
        ("Unlock the account b.costa.", "Unlock the account b.haas.", 0.0),
        ("Make the user a member of HR-Admins.", "Add the user to HR-Users.", 0.0),
        ("Exclude calls from the VPN tunnel.", "Set up split tunneling of calls.", None),  # an abbreviation
        ("Use the built-in driver.", "Take the driver that is built in.", None),
        ("Restart it.", "", 0.0),
        ("Restart it.", " ... ", 0.0),
        ("Restart it.", "Start it again.", None),
        ("Restart it.", "Start it again. That should help.", 0.0),  # more sentences
        ("Stop it. Start it again.", "Restart it by a stop and a start.", None),
        ("Restart it.", "Start it again\nand again", 0.0),
        ("Restart it.", "<b>Start</b> it again.", 0.0),  # marks
        ("Restart it.", "Start " + "it again " * 9, 0.0),  # long
    ],
)
def test_rules_decide_by_names_numbers_and_form(reference: str, response: str, verdict: float | None) -> None:
    assert decide(reference, response) == verdict


def test_rules_refuse_wrong_fixes_and_few_other_wordings_of_the_training_data() -> None:
    found = Counter((label, decide(*pair)) for *pair, label in read_labels(HELPDESK / "judge_training.jsonl"))
    assert found[0.0, 0.0] > 320
    assert found[1.0, 0.0] == 32  # right ones with a sentence more, such as "Try again then."
    assert not found[0.0, 1.0]


def test_no_accepted_wording_of_the_pairs_is_refused_and_no_injection_gets_as_far_as_the_model() -> None:
    labels = read_labels(PAIRS)
    assert all(decide(reference, reply) != 0 for reference, reply, label in labels if label >= 0.5)
    wrong = [(reference, reply) for reference, reply, label in labels if label < 0.5]
    left = [attempt for attempt in attempts(wrong) if decide(*attempt) != 0]
    assert len(left) < 0.02 * len(attempts(wrong))


def test_a_strict_judge_computes_as_rollouts_do(resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("Restart the print spooler.", "Start the print spooler again."), ("Clean the glass.", "Order a scanner.")]
    exact = Judge(LocalModel(LocalGenerator(resident)))(pairs)
    bfloat16 = replace(resident.hardware, autocast="bfloat16")
    monkeypatch.setattr(resident, "hardware", bfloat16)
    assert Judge(LocalModel(LocalGenerator(resident)))(pairs) == exact
    rounded = open_judge(JudgeSettings(strict=True), lambda: LocalGenerator(resident))(pairs)
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.1)


def test_what_the_rule_decides_is_not_asked() -> None:
    asked: list[str] = []

    class Recorder:
        def ask(self, groups: list[list[Messages]], values: object) -> list[list[float | None]]:
            asked.extend(messages[-1]["content"] for group in groups for messages in group)
            return [[0.7 for _ in group] for group in groups]

    answerer = Recorder()
    pairs = [
        ("Open port 22.", "Open port 22"),
        ("Open port 22.", "Open port 23."),
        ("Open port 22.", "Unblock port 22."),
    ]
    judge = Judge(answerer, JudgeSettings(strict=True))
    assert judge(pairs) == [1.0, 0.0, 0.7]
    assert judge.asked == len(asked) == 1
    assert "Unblock port 22." in asked[0]
    assert Judge(answerer)(pairs) == [0.7] * 3


def test_the_default_question_is_the_one_that_recorded_results_were_made_with() -> None:
    assert render_judge("Open port 22.", "Unblock <<<port>>> 22.") == [
        {
            "role": "system",
            "content": "You compare a response with a reference. Reply yes if both say the same, otherwise no.",
        },
        {
            "role": "user",
            "content": "Reference: Open port 22.\nResponse: <<< Unblock  port  22. >>>\nDo they say the same?",
        },
    ]
    assert JudgeSettings() == JudgeSettings(strict=False, unfit="warn")
