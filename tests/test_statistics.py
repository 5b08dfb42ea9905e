"""Intervals and tests against values worked out by hand."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from qreason.report.statistics import direction, gain, mean, rate, share, sign_test
from qreason.report.table import bins, percent, plain_table, sparkline

NOTHING = {"mean": None, "low": None, "high": None}


def test_wilson_interval_of_eight_in_ten() -> None:
    # centre (0.8 + 3.8415/20) / 1.38415 = 0.71674; half 1.96 sqrt(0.016 + 3.8415/400) / 1.38415 = 0.22657
    assert share([True] * 8 + [False] * 2) == {"mean": 0.8, "low": 0.4902, "high": 0.9433}


def test_wilson_interval_stays_open_where_nothing_hit() -> None:
    # 3.8415 / (10 + 3.8415)
    assert share([False] * 10) == {"mean": 0.0, "low": 0.0, "high": 0.2775}
    assert share([True] * 10) == {"mean": 1.0, "low": 0.7225, "high": 1.0}


def test_nothing_to_average_is_no_number() -> None:
    assert share([]) == mean([]) == mean([None, None]) == gain([None], [1.0]) == NOTHING


def test_bootstrap_brackets_the_mean_with_its_standard_error() -> None:
    values = [float(value) for value in range(100)]
    found = mean(values)
    assert found["mean"] == 49.5
    # 1.96 standard errors of 28.87 / sqrt(100)
    assert found["low"] == pytest.approx(49.5 - 5.66, abs=0.5)
    assert found["high"] == pytest.approx(49.5 + 5.66, abs=0.5)


def test_bootstrap_gives_the_same_interval_again() -> None:
    assert mean([0.0, 0.3, 1.0, 0.2]) == mean([0.0, 0.3, 1.0, 0.2])


def test_rows_without_a_value_are_left_out_and_are_not_zero() -> None:
    assert mean([1.0, None, 1.0, None]) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_share_and_sign_test_leave_out_what_was_not_judged() -> None:
    assert share([True, None, False]) == share([True, False])
    assert share([None]) == NOTHING
    assert sign_test([False, None, False], [True, True, None]) == sign_test([False], [True])


def test_gain_is_paired_by_row() -> None:
    # Rows differ widely, the gain on each is the same: paired, there is no doubt left.
    before = [0.0, 5.0, 10.0, 50.0]
    assert gain(before, [value + 1 for value in before]) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_rows_that_are_all_alike_leave_doubt_where_they_are_few() -> None:
    # The interval had no width: of two rows without a change it was said that the steps do nothing.
    assert gain([False] * 200, [False] * 200) == {"mean": 0.0, "low": -0.0188, "high": 0.0188}  # 3.8415 / 203.8415
    assert rate([0.0] * 10) == share([False] * 10)
    assert rate([1.0, None] * 10) == share([True] * 10)
    assert rate([0.5] * 10 + [0.25] * 2) == mean([0.5] * 10 + [0.25] * 2)


def test_a_gain_that_all_rows_share_has_an_interval_with_a_width() -> None:
    # It was [1, 1] for a single row that became right, and the headline took it for established.
    assert gain([False] * 2, [True] * 2) == {"mean": 1.0, "low": -0.3152, "high": 1.0}  # 1 - 2 * 3.8415 / 5.8415
    assert gain([0.25] * 10, [0.75] * 10) == {"mean": 0.5, "low": 0.0837, "high": 0.6388}
    lost = gain([True] * 200, [False] * 200)
    assert lost == {"mean": -1.0, "low": -1.0, "high": -0.9623}
    assert direction(lost) == -1


@pytest.mark.parametrize("rows", range(1, 9))
def test_a_gain_is_established_where_interval_and_sign_test_say_so(rows: int) -> None:
    before, after = [False] * rows, [True] * rows
    assert direction(gain(before, after) | {"p": sign_test(before, after)}) == (rows >= 6)  # 2 / 2**6 < 0.05
    most = [*before, False], [*after, False]  # no resample without a gain is drawn often enough
    assert direction(gain(*most) | {"p": sign_test(*most)}) == (rows >= 6)
    assert direction(gain(after, before) | {"p": sign_test(after, before)}) == -(rows >= 6)
    assert direction(dict(NOTHING)) == 0


def test_sign_test_of_many_rows_is_quick() -> None:
    start = time.perf_counter()  # was minutes
    assert sign_test([0] * 20_000, [place % 2 * 2 - 1 for place in range(20_000)]) == 1.0
    assert time.perf_counter() - start < 5


def test_gain_leaves_out_rows_that_lack_either_side() -> None:
    assert gain([1.0, None, 2.0], [3.0, 9.0, None])["mean"] == 2.0


def test_loss_is_a_negative_gain() -> None:
    lost = gain([1.0] * 20, [0.0] * 20)
    assert lost["high"] is not None
    assert lost["high"] < 0


def test_gain_of_unequal_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        gain([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("up", "down", "p"),
    [
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (1, 1, 1.0),
        (0, 0, 1.0),
    ],
)
def test_sign_test_is_the_exact_two_sided_tail(up: int, down: int, p: float) -> None:
    before = [0.0] * up + [1.0] * down + [1.0] * 7
    after = [1.0] * up + [0.0] * down + [1.0] * 7  # ties say nothing
    assert sign_test(before, after) == pytest.approx(p)


def test_a_curve_is_drawn_from_zero_to_its_highest_point() -> None:
    assert sparkline([0.0, 0.5, 1.0, 0.25]) == "▁▅█▃"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([-1.0, 2.0]) == "▁█"


def test_a_long_curve_is_drawn_by_the_means_of_equal_stretches() -> None:
    assert bins([1.0, 3.0, 5.0, 7.0], most=2) == [2.0, 6.0]
    assert bins([1.0, 2.0, 3.0], most=2) == [1.0, 2.5]
    assert bins([4.0], most=30) == [4.0]
    assert bins([], most=30) == []


def test_no_figure_is_cut_in_a_narrow_terminal() -> None:
    table = plain_table(["after"], [f"figure {number}" for number in range(7)])
    table.add_row("01-sft", *(percent(share([True] * number + [False] * 9)) for number in range(7)))
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()  # `[0–3…` in place of `[0–30%]`
    assert "…" not in text
    assert text.count("]") == 7
