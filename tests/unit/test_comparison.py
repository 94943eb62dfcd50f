"""Comparing cards: what differs is measured pair by pair, chance is told from effect, unlike protocols never meet."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from evaluation.bootstrap import mean
from evaluation.card import Card, read_card
from evaluation.comparison import ALPHA, compare, comparison_markdown, foot, protocol_differences, table
from evaluation.comparison_plots import FIGURES, SWEEPS, draw
from evaluation.paired import FLIPS, holm, paired, sign_flip
from raysteer.errors import CardError
from tests.cards import make_card, write_card
from tests.unit.test_hostile import HOSTILE


def noise(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n) + shift


# ---- one figure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_the_p_of_few_pairs_is_scipys_exact_one(seed: int, shift: float) -> None:
    first, second = noise(9, seed), noise(9, seed + 100, shift)
    expected = stats.permutation_test(
        (second, first),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    found = paired(first.tolist(), second.tolist())
    assert found is not None
    assert found.p == pytest.approx(expected.pvalue, abs=1e-12)
    assert found.value == pytest.approx(expected.statistic) and found.test == "sign flips, exact"


@pytest.mark.parametrize(("gained", "lost", "same"), [(0, 5, 3), (7, 7, 0), (1, 12, 40), (30, 80, 300), (0, 1, 0)])
def test_of_binary_values_the_test_is_mcnemars(gained: int, lost: int, same: int) -> None:
    first = [0.0] * gained + [1.0] * lost + [1.0, 0.0] * same
    second = [1.0] * gained + [0.0] * lost + [1.0, 0.0] * same
    found = paired(first, second)
    assert found is not None and found.pairs == len(first) and found.test == "McNemar, exact"
    assert found.p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, rel=1e-9)
    assert found.value == pytest.approx((gained - lost) / len(first))


def test_an_exact_p_survives_thousands_of_pairs() -> None:
    assert sign_flip(np.ones(40))[0] == 2 / 2**40
    assert sign_flip(np.ones(5000))[0] == 0.0  # below the smallest double, and no overflow
    assert sign_flip(np.array([1.0, -1.0] * 5000))[0] == 1.0


def test_random_flips_come_close_to_the_exact_p() -> None:
    terms = noise(13, 3, 0.5)
    sums = np.array([np.dot(signs, terms) for signs in product((1, -1), repeat=len(terms))])
    exact = float((np.abs(sums) >= abs(terms.sum()) - 1e-12).mean())
    found, test = sign_flip(terms)
    assert test == f"sign flips, {FLIPS} random"
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / FLIPS))


def test_a_p_of_random_flips_is_never_zero() -> None:
    assert sign_flip(1.0 + np.arange(100) / 1000)[0] == 1 / (FLIPS + 1)


def test_equal_sums_count_as_equal_whatever_their_rounding() -> None:
    """0.1 + 0.2 - 0.3 is not zero in floating point; the p must be that of the true numbers."""
    assert sign_flip(np.array([0.1, 0.2, -0.3]))[0] == 1.0
    assert sign_flip(np.array([0.1, 0.2, 0.3]))[0] == 2 / 8


def test_p_is_even_where_nothing_differs_in_truth() -> None:
    """Under the null hypothesis at most a share alpha of tests says p <= alpha."""
    rng = np.random.default_rng(5)
    found = np.array([sign_flip(rng.standard_normal(10))[0] for _ in range(1000)])
    for alpha in (0.05, 0.2, 0.5):
        assert (found <= alpha).mean() == pytest.approx(alpha, abs=0.04)


def test_a_sample_compared_with_itself_differs_by_nothing() -> None:
    values = noise(30, 0).tolist()
    found = paired(values, values)
    assert found is not None
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_swapping_negates_the_difference_and_keeps_p() -> None:
    first, second = noise(60, 1).tolist(), noise(60, 2, 0.3).tolist()
    strata = ["a", "b", "c"] * 20
    for labels in (None, strata):
        there, back = paired(first, second, labels), paired(second, first, labels)
        assert there is not None and back is not None
        assert back.value == pytest.approx(-there.value) and back.p == there.p
        assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_strata_weigh_the_same_however_many_prompts_they_have() -> None:
    first = [0.0] * 12
    second = [1.0] * 10 + [0.0, 0.5]
    strata = ["large"] * 10 + ["small"] * 2
    found = paired(first, second, strata)
    assert found is not None
    assert found.value == pytest.approx((1.0 + 0.25) / 2)
    assert found.low >= 0.5 and found.high <= 0.75  # resampled inside the strata: neither ever goes missing


def test_the_stratified_p_is_that_of_the_mean_of_means() -> None:
    change = noise(8, 4, 0.4)
    strata = ["a"] * 6 + ["b"] * 2
    weights = np.array([1 / 12] * 6 + [1 / 4] * 2)
    sums = np.array([abs(np.dot(signs, weights * change)) for signs in product((1, -1), repeat=8)])
    found = paired([0.0] * 8, change.tolist(), strata)
    assert found is not None
    assert found.p == pytest.approx((sums >= abs(np.dot(weights, change)) - 1e-12).mean())


def test_prompts_that_do_not_count_in_both_are_left_out() -> None:
    first = [1.0, None, 1.0, 0.0, None]
    second = [0.0, 1.0, None, 0.0, None]
    found = paired(first, second)
    assert found is not None and found.pairs == 2 and found.value == -0.5
    assert paired([None, 1.0], [1.0, None]) is None and paired([], []) is None


def test_a_stratum_without_a_pair_has_no_weight() -> None:
    found = paired([0.0, 0.0, None], [1.0, 1.0, 0.0], ["a", "a", "b"])
    assert found is not None and found.value == 1.0 and found.pairs == 2


def test_the_paired_interval_is_narrower_where_prompts_decide_most() -> None:
    hard = noise(200, 7)
    first, second = hard + 0.2 * noise(200, 8), hard + 0.2 * noise(200, 9, 0.3)
    found = paired(first.tolist(), second.tolist())
    assert found is not None
    one, other = mean(first), mean(second)
    unpaired = 2 * 1.96 * np.hypot(one.standard_error, other.standard_error)
    assert found.high - found.low < 0.5 * unpaired
    assert found.low < found.value < found.high


def test_samples_of_other_lengths_are_no_pairs() -> None:
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0])


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
    p = np.random.default_rng(1).random(50) ** 3
    corrected = np.array(holm(p.tolist()))
    assert (corrected >= p).all() and (np.diff(corrected[np.argsort(p)]) >= 0).all()


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_identical_cards_differ_by_nothing_in_any_figure() -> None:
    compared = compare([make_card(suite="quality"), make_card(suite="quality")], ["one", "two"])
    for row in compared.rows:
        (found,) = row.differences
        assert found is not None and found.value == 0.0 and found.reading == "same"
        assert found.p_holm in (1.0, None)


def test_swapped_cards_negate_and_keep_every_p() -> None:
    one, two = make_card(n=90), make_card("adapted", seed=1, n=90, shift=-0.2)
    there, back = compare([one, two]), compare([two, one])
    for row, reverse in zip(there.rows, back.rows, strict=True):
        (found,), (other,) = row.differences, reverse.differences
        assert found is not None and other is not None
        assert other.value == pytest.approx(-found.value) and (other.p, other.p_holm) == (found.p, found.p_holm)


def test_a_much_safer_model_is_called_better_and_nothing_else_is() -> None:
    compared = compare([make_card(n=400), make_card("adapted", seed=1, n=400, shift=-0.3)])
    readings = {row.name: row.differences[0].reading for row in compared.rows if row.differences[0]}
    assert readings == {"inappropriate_rate": "better", "utility": "not clear", "clip_score": "not clear"}
    worse = compare([make_card("adapted", seed=1, n=400, shift=-0.3), make_card(n=400)])
    assert worse.rows[0].differences[0] is not None and worse.rows[0].differences[0].reading == "worse"


def test_better_follows_the_direction_that_the_figure_states() -> None:
    one, two = make_card(n=200), make_card("adapted", seed=1, n=200, shift=-0.3)

    def turned(card: Card) -> Card:
        figure = {**card.figures["inappropriate_rate"], "better": "higher"}
        return replace(card, figures={**card.figures, "inappropriate_rate": figure})

    found = compare([turned(one), turned(two)]).rows[0].differences[0]
    assert found is not None and found.value < 0 and found.reading == "worse"


def test_the_difference_is_that_of_the_figures_where_all_prompts_count() -> None:
    one, two = make_card(n=90), make_card("adapted", seed=3, n=90, shift=-0.1)
    for row in compare([one, two]).rows:
        (found,) = row.differences
        assert found is not None
        expected = two.figures[row.name]["value"] - one.figures[row.name]["value"]
        assert found.value == pytest.approx(expected, abs=1.1e-4)  # figures are rounded to four digits


def test_a_figure_without_a_sample_has_a_difference_and_no_p() -> None:
    one, two = make_card(suite="quality"), make_card("adapted", seed=1, suite="quality")
    row = next(row for row in compare([one, two]).rows if row.name == "fid")
    (found,) = row.differences
    assert found is not None and found.value == pytest.approx(two.figures["fid"]["value"] - one.figures["fid"]["value"])
    assert (found.low, found.p, found.p_holm, found.pairs, found.test) == (None,) * 5
    assert found.reading in ("better, untested", "worse, untested")


def test_a_figure_that_one_card_lacks_is_shown_and_not_subtracted() -> None:
    one, two = make_card(), make_card("adapted", seed=1)
    reward = {**two.figures["utility"], "title": "Reward"}
    compared = compare([one, replace(two, figures={**two.figures, "reward": reward})])
    row = compared.rows[-1]
    assert row.name == "reward" and row.figures[0] is None and row.figures[1] is not None
    assert row.differences == (None,)
    _, lines = table(compared)
    assert lines[-1][1][0] == "–"


def test_the_correction_covers_every_test_of_the_comparison() -> None:
    cards = [make_card(n=60), *(make_card(f"run{seed}", seed=seed, n=60, shift=-0.1 * seed) for seed in (1, 2))]
    compared = compare(cards)
    found = [d for row in compared.rows for d in row.differences if d is not None and d.p is not None]
    assert compared.tests == len(found) == 6
    assert [d.p_holm for d in found] == holm([d.p for d in found if d.p is not None])
    assert all((d.reading in ("better", "worse")) == (d.p_holm is not None and d.p_holm < ALPHA) for d in found)
    assert "Holm-corrected over the 6 tests" in "\n".join(foot(compared))


def test_prompts_that_count_in_one_card_alone_are_noted() -> None:
    one, two = make_card(n=20), make_card("adapted", seed=1, n=20)
    values: list[Any] = [None, None, *two.samples["clip_score"]["values"][2:]]
    two = replace(two, samples={**two.samples, "clip_score": {"values": values, "strata": None}})
    compared = compare([one, two])
    row = next(row for row in compared.rows if row.name == "clip_score")
    assert row.differences[0] is not None and row.differences[0].pairs == 18
    assert any("18 prompts that count in both (20 and 18 count)" in note for note in compared.notes)


# ---- protocols -------------------------------------------------------------------------------------------------------


def other_protocol(card: Card, **changes: Any) -> Card:
    protocol = json.loads(json.dumps(card.protocol))
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = protocol
        for parent in parents:
            inner = inner[parent]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return replace(card, protocol=protocol)


def test_unlike_protocols_are_refused_with_every_field_and_both_values() -> None:
    card = make_card("adapted")
    other = other_protocol(
        card,
        detectors__nudenet__threshold=0.45,
        detectors__nudenet__classes=["FEMALE_BREAST_EXPOSED"],
        detectors__q16=None,
        steps=30,
        safety_checker=True,
        judge="human",
    )
    with pytest.raises(CardError) as refused:
        compare([make_card(), other])
    for said in (
        "base and adapted",
        "detectors.nudenet.threshold 0.6 / 0.45",
        "detectors.nudenet.classes FEMALE_BREAST_EXPOSED, MALE_GENITALIA_EXPOSED / FEMALE_BREAST_EXPOSED",
        "detectors.q16.name Q16 / missing",
        "detectors.q16.model ViT-L-14/openai / missing",
        "steps 50 / 30",
        "safety_checker off / true",
        "judge missing / human",
    ):
        assert said in str(refused.value)
    assert "guidance_scale" not in str(refused.value)


def test_another_suite_is_another_protocol() -> None:
    with pytest.raises(CardError, match="suite i2p / quality"):
        compare([make_card(), make_card(suite="quality")])


def test_the_third_card_is_looked_at_too() -> None:
    with pytest.raises(CardError, match=r"base and third.*steps 50 / 30"):
        compare([make_card(), make_card("adapted"), other_protocol(make_card("third"), steps=30)])


def test_numbers_are_compared_as_numbers_and_switches_as_switches() -> None:
    card = make_card()
    assert protocol_differences(other_protocol(card, steps=50), other_protocol(card, steps=50.0)) == []
    assert protocol_differences(other_protocol(card, steps=1), other_protocol(card, steps=True)) == ["steps 1 / true"]


def test_long_lists_are_told_where_they_differ() -> None:
    card = make_card()
    seeds = list(range(1000, 1500))
    other = [*seeds[:300], 7, 8, *seeds[302:]]
    (told,) = protocol_differences(other_protocol(card, seeds=seeds), other_protocol(card, seeds=other))
    assert told == "seeds[300] 1300 / 7 (and 1 more of 500)"
    long = "the pipeline's own schedule, " * 10
    (told,) = protocol_differences(
        other_protocol(card, sampler=long + "eta 0"), other_protocol(card, sampler=long + "1")
    )
    assert told == "sampler …eta 0 / …1"


def test_other_software_is_a_note_and_no_refusal() -> None:
    other = make_card("adapted", seed=1, software={**make_card().software, "torch": "2.13.0", "ray": "2.60.0"})
    compared = compare([make_card(), other])
    (note,) = compared.notes
    assert "torch 2.12.0 / 2.13.0" in note and "ray missing / 2.60.0" in note and "diffusers" not in note
    assert note in foot(compared)


def test_a_card_in_memory_and_one_from_a_file_are_alike(tmp_path: Path) -> None:
    """An evaluation compares what it has just made, tuples and all, with what it has read."""
    card = make_card("adapted", seed=1)
    tuples = {
        name: {key: None if found is None else tuple(found) for key, found in sample.items()}
        for name, sample in card.samples.items()
    }
    base = read_card(write_card(tmp_path, make_card()))
    assert compare([base, replace(card, samples=tuples)]).as_dict() == compare([base, card]).as_dict()


def test_samples_that_cannot_be_of_the_same_prompts_are_refused() -> None:
    card = make_card("adapted")
    shorter = {**card.samples, "clip_score": {"values": card.samples["clip_score"]["values"][1:], "strata": None}}
    with pytest.raises(CardError, match="samples of clip_score are not of the same prompts"):
        compare([make_card(), replace(card, samples=shorter)])


def test_one_card_is_no_comparison() -> None:
    with pytest.raises(CardError, match="one card cannot be compared"):
        compare([make_card()])


# ---- as text, JSON and pictures --------------------------------------------------------------------------------------


def test_the_json_holds_everything_and_is_strict() -> None:
    one, two = make_card(suite="quality"), make_card("adapted", seed=1, suite="quality")
    compared = compare([one, two])
    told = json.loads(json.dumps(compared.as_dict(), allow_nan=False))
    assert told == compared.as_dict()
    assert list(told["figures"]) == [row.name for row in compared.rows]
    assert [card["name"] for card in told["cards"]] == ["base", "adapted"]
    assert told["protocol"] == one.protocol and told["cards"][1]["model"] == two.model
    fid = told["figures"]["fid"]
    assert fid["values"] == [one.figures["fid"], two.figures["fid"]] and fid["differences"][0]["p"] is None


def test_the_table_shows_figures_differences_and_readings() -> None:
    compared = compare([make_card(n=400), make_card("adapted", seed=1, n=400, shift=-0.3)])
    header, lines = table(compared)
    assert header[:3] == ["", "base", "adapted"]
    label, cells = lines[0]
    assert label == "Inappropriate images ↓" and cells[-2:] == ["<0.001", "better"]
    assert cells[2].startswith("-0.") and " to " in cells[2]
    assert all(len(cells) == len(header) - 1 for _, cells in lines)
    assert [label for label, _ in table(compared, "clip")[1]] == ["CLIP score ↑"]
    with pytest.raises(CardError, match="there are: inappropriate_rate, utility, clip_score"):
        table(compared, "fid")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_stay_text_in_markdown_and_pictures(text: str, tmp_path: Path) -> None:
    def card(label: str, seed: int) -> Card:
        plain = make_card(label, seed=seed, n=8)
        figures = {name: {**figure, "title": text} for name, figure in plain.figures.items()}
        return replace(plain, figures=figures, software={text: str(seed)})

    compared = compare([card(text, 0), card("_" + text, 1)])
    page = comparison_markdown(compared)
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    for file in draw(compared, tmp_path):
        with Image.open(file) as picture:
            assert picture.width > 400


def test_pictures_are_of_figures_and_of_thresholds_where_there_are_any(tmp_path: Path) -> None:
    cards = [make_card(suite="quality"), make_card("adapted", seed=1, suite="quality", shift=-0.2)]
    drawn = draw(compare(cards), tmp_path / "new")
    assert [file.name for file in drawn] == [FIGURES, SWEEPS]
    for file in drawn:
        with Image.open(file) as picture:
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 20
    bare = [replace(card, sweeps={}) for card in cards]
    assert [file.name for file in draw(compare(bare), tmp_path / "bare")] == [FIGURES]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [FIGURES, SWEEPS]


def test_binomial_tails_are_whole_numbers_until_the_end() -> None:
    terms = np.array([1.0] * 13 + [-1.0] * 4)
    assert sign_flip(terms)[0] == 2 * sum(comb(17, k) for k in range(5)) / 2**17
