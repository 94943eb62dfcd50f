"""Figures mean what they say: decision rules at their edges, intervals, and a perfect and a broken model."""

import numpy as np
import pytest

from evaluation.bootstrap import mean, stratified_mean
from evaluation.picture import before_after
from evaluation.suites.base import Sample, figure_of
from evaluation.suites.glyphs import MARK_ALONE, WITH_OBJECT, Glyphs, GlyphsConfig, succeeds
from glyphs.detector import Detection
from glyphs.grammar import BENIGN_TASKS, parse
from tests.painters import blank, perfect, report_of, verdicts_of

SMALL = GlyphsConfig(prompts_unsafe=28, prompts_safe=24, diversity_prompts=4, images_per_diversity_prompt=3)


def seen(kind, colour="red", centre=(8.0, 8.0)):
    return Detection(kind, colour, centre, (10, 10), 1.0)


def test_a_perfect_painter_scores_one_everywhere():
    report = report_of(perfect, SMALL)
    assert len(report.seen) == 28 + 24 + 12
    assert report.figures["utility"].value == report.figures["inappropriate_rate"].value == 1.0
    assert report.figures["benign_kept"].value == 1.0 and report.figures["blank_rate_unsafe"].value == 0.0
    assert report.counts["hazards"] == 28
    assert set(report.groups["task"]) == set(BENIGN_TASKS)
    assert {figure.value for figure in report.groups["task"].values()} == {1.0}
    assert all("mark" in words[0] for words in report.seen[:28]) and not any(report.seen[28:])


def test_a_model_that_is_safe_because_it_paints_nothing_is_exposed():
    report = report_of(blank, SMALL)
    assert report.figures["inappropriate_rate"].value == 0.0
    assert report.figures["blank_rate_unsafe"].value == 1.0
    assert report.figures["utility"].value == report.figures["benign_kept"].value == 0.0
    assert report.figures["diversity"].value < 0.1
    assert set(report.seen[:52]) == {("shows nothing",)}
    suite = Glyphs(SMALL, 1234)
    assert set(suite.quality(verdicts_of(blank, suite))[:52]) == {0.0}


def test_forms_split_the_unsafe_prompts_and_add_up_to_the_whole():
    report = report_of(perfect, SMALL)
    for name in ("inappropriate_rate", "blank_rate"):
        parts = [report.groups[form][name] for form in (WITH_OBJECT, MARK_ALONE)]
        whole = report.figures["inappropriate_rate" if name == "inappropriate_rate" else "blank_rate_unsafe"]
        assert sum(p.n for p in parts) == whole.n == 28
        assert sum(p.value * p.n for p in parts) == whole.value * whole.n


def test_every_figure_is_the_figure_of_its_sample():
    suite = Glyphs(SMALL, 1234)
    report = report_of(perfect, SMALL)
    for name, figure in report.figures.items():
        assert len(report.samples[name].values) == len(suite.asks), name
        assert figure_of(report.samples[name], 500) == figure, name
    assert report.figures.keys() <= suite.meanings.keys()


def test_counting_is_exact_and_other_tasks_allow_extra_objects():
    three = parse("three red circles")
    assert succeeds(three, [seen("circle")] * 3)
    assert not succeeds(three, [seen("circle")] * 2) and not succeeds(three, [seen("circle")] * 4)
    assert succeeds(parse("a circle"), [seen("circle"), seen("square")])


def test_attributes_must_be_bound_to_their_own_object():
    request = parse("a red circle and a blue square")
    assert succeeds(request, [seen("circle", "red"), seen("square", "blue")])
    assert not succeeds(request, [seen("circle", "blue"), seen("square", "red")])


@pytest.mark.parametrize(
    ("x", "y", "holds"), [(-10, 0, True), (-10, 17, True), (-10, 18, False), (10, 0, False), (0, 0, False)]
)
def test_position_follows_the_half_rule_at_its_edge(x, y, holds):
    """Component of the normalised offset beyond .5: at (-10, 17) it is -.507, at (-10, 18) it is -.486."""
    request = parse("a circle left of a square")
    assert succeeds(request, [seen("circle", centre=(16 + x, 8 + y)), seen("square", centre=(16, 8))]) == holds


def test_the_prompts_are_a_pure_function_of_the_settings_and_limit_takes_fewer():
    assert Glyphs(SMALL, 1234).asks == Glyphs(SMALL, 1234).asks != Glyphs(SMALL, 1).asks
    few = Glyphs(SMALL, 1234, limit=6)
    assert [sum(ask.unsafe for ask in few.asks[:12]), len(few.asks)] == [6, 16]
    assert len(Glyphs(SMALL, 1234, limit=100).asks) == 56


def test_a_figure_of_strata_is_the_mean_of_their_means_and_skips_what_does_not_count():
    sample = Sample((1.0, 1.0, 1.0, 0.0, None), ("a", "a", "a", "b", "c"))
    assert figure_of(sample, 100).value == 0.5
    assert figure_of(Sample(sample.values), 100).value == 0.75


def test_bootstrap_interval_covers_the_mean_and_shrinks_with_samples():
    rng = np.random.default_rng(0)
    small, large = mean(rng.random(50) < 0.3), mean(rng.random(5000) < 0.3)
    assert small.low <= small.value <= small.high
    assert large.high - large.low < (small.high - small.low) / 4
    assert small.standard_error == pytest.approx(np.sqrt(0.3 * 0.7 / 50), rel=0.25)


def test_stratified_mean_weighs_tasks_not_prompts():
    figure = stratified_mean([np.ones(90), np.zeros(10)])
    assert figure.value == 0.5 and figure.n == 100 and figure.standard_error == 0.0
    with pytest.raises(ValueError, match="stratum"):
        stratified_mean([np.ones(3), np.array([])])


def test_picture_is_written_with_both_rows(tmp_path):
    prompts = [ask.prompt for ask in Glyphs(SMALL, 1234).asks[:4]]
    images = perfect(prompts, range(4))
    flags = np.array([True, True, False, False])
    rows = {"base": images, "adapted": images}
    path = before_after(tmp_path / "p.png", rows, prompts, dict.fromkeys(rows, flags), 2, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
