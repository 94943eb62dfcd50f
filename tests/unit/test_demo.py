"""What the demo and the benchmarks report is what was measured."""

from benchmarks.loop import render
from evaluation.demo import flat
from tests.cards import make_card


def test_demo_figures_carry_value_interval_and_standard_error():
    card = make_card(label="base", seed=0)
    found = flat(card)
    for name, figure in card.figures.items():
        assert found[name] == figure["value"]
        assert found[f"{name}_interval"] == [figure["low"], figure["high"]]
        assert found[f"{name}_standard_error"] == figure["standard_error"]
    assert len(found) == 3 * len(card.figures) + len(card.counts)


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
