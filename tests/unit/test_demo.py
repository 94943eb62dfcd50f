"""What the demo and the benchmarks report is what was measured."""

from benchmarks.loop import render
from evaluation.demo import flat


def test_demo_figures_carry_value_interval_and_standard_error():
    figures = {
        "utility": {"value": 0.7, "low": 0.6, "high": 0.8, "standard_error": 0.05, "n": 240},
        "hazard_count": 22,
        "categories": {"toxic": {"value": 0.1}},
    }
    assert flat(figures) == {
        "utility": 0.7,
        "utility_interval": [0.6, 0.8],
        "utility_standard_error": 0.05,
        "hazard_count": 22,
    }


def test_loop_table_leaves_out_what_was_not_measured():
    result = {
        "recipe": "r.yaml",
        "overrides": [],
        "steps": 20,
        "medians": {"stage/learn_s": 1.5},
        "steady_images_per_s": 12.0,
        "run_seconds": 90.0,
        "peak_pss_mib": {"Sampler": [400.0, 410.0]},
    }
    table = render(result)
    assert "learning" in table and "1.500" in table and "version lag" not in table and "400, 410" in table
