"""GenEval's rules at their edges: what counts as seen, how many are enough, which colour is judged, and places."""

from typing import Any

import pytest

from evaluation.suites.geneval_rules import (
    Clause,
    Found,
    Thresholds,
    Wanted,
    counted,
    faults,
    kept,
    overlap,
    relations,
)

AT = Thresholds()
DOT = (0.0, 0.0, 0.0, 0.0)


def seen(name: str, score: float = 0.95, box: tuple[float, ...] = DOT, colour: str | None = None) -> dict[str, Any]:
    return {"class": name, "score": score, "box": list(box), "colour": colour, "colour_score": None}


def found(*colours: str | None) -> list[Found]:
    return [Found(0.9, (0.0, 0.0, 1.0, 1.0), colour) for colour in colours]


def dot(x: float, y: float) -> tuple[float, float, float, float]:
    return (x, y, x, y)


def centred(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def wants(*include: Clause, exclude: tuple[Clause, ...] = (), task: str = "two_object") -> Wanted:
    return Wanted(task, include, exclude)


# ---- what counts as seen --------------------------------------------------------------------------------------------


def test_a_score_must_exceed_its_threshold_and_counting_has_its_own() -> None:
    verdict = [seen("car", 0.3), seen("car", 0.300001), seen("car", 0.9), seen("car", 0.900001)]
    assert [f.score for f in kept(verdict, "colors", AT)["car"]] == [0.900001, 0.9, 0.300001]
    assert [f.score for f in kept(verdict, "counting", AT)["car"]] == [0.900001]


def test_a_class_without_a_sure_object_is_not_seen_at_all() -> None:
    assert kept([seen("car", 0.2)], "colors", AT) == {} == kept([], "colors", AT)


def test_of_too_many_objects_the_surest_of_each_class_count() -> None:
    verdict = [seen("car", 0.4 + index / 100) for index in range(20)] + [seen("dog", 0.35)]
    objects = kept(verdict, "colors", AT)
    assert len(objects["car"]) == 16 and min(f.score for f in objects["car"]) == pytest.approx(0.44)
    assert len(objects["dog"]) == 1


def test_overlapping_objects_count_twice_as_published_and_once_where_that_is_asked_for() -> None:
    verdict = [seen("car", 0.9, (0, 0, 9, 9)), seen("car", 0.8, (0, 0, 9, 9)), seen("car", 0.7, (50, 50, 59, 59))]
    assert len(kept(verdict, "colors", AT)["car"]) == 3
    apart = kept(verdict, "colors", Thresholds(max_overlap=0.5))["car"]
    assert [f.score for f in apart] == [0.9, 0.7]


def test_an_overlap_of_exactly_the_limit_is_too_much() -> None:
    verdict = [seen("car", 0.9, (0, 0, 9, 9)), seen("car", 0.8, (0, 0, 9, 4))]  # 50 of 100 pixels
    assert overlap((0, 0, 9, 9), (0, 0, 9, 4)) == 0.5
    assert len(kept(verdict, "colors", Thresholds(max_overlap=0.5))["car"]) == 1
    assert len(kept(verdict, "colors", Thresholds(max_overlap=0.51))["car"]) == 2


def test_an_object_that_only_a_dropped_one_overlaps_is_kept() -> None:
    boxes = [(0, 0, 9, 9), (0, 5, 9, 14), (0, 10, 9, 19)]
    verdict = [seen("car", 0.9 - index / 10, box) for index, box in enumerate(boxes)]
    apart = kept(verdict, "colors", Thresholds(max_overlap=0.3))["car"]
    assert [f.box for f in apart] == [boxes[0], boxes[2]]


# ---- how many -------------------------------------------------------------------------------------------------------


def test_as_many_as_asked_for_or_more_are_enough_and_fewer_are_not() -> None:
    wanted = wants(Clause("car", 3))
    assert faults(wanted, {"car": found(None) * 3}, AT) == () == faults(wanted, {"car": found(None) * 4}, AT)
    assert faults(wanted, {"car": found(None) * 2}, AT) == ("expected 3 cars, found 2",)
    assert faults(wanted, {"dog": found(None) * 3}, AT) == ("expected 3 cars, found 0",)


def test_as_many_as_excluded_are_too_many() -> None:
    wanted = wants(Clause("bus", 3), exclude=(Clause("bus", 4),), task="counting")
    assert faults(wanted, {"bus": found(None) * 3}, AT) == ()
    assert faults(wanted, {"bus": found(None) * 5}, AT) == ("expected at most 3 buses, found 5",)
    assert faults(wanted, {"bus": found(None) * 2}, AT) == ("expected 3 buses, found 2",)


def test_every_clause_is_judged() -> None:
    wanted = wants(Clause("dog", 1), Clause("cat", 1), exclude=(Clause("person", 1),))
    everything = ("expected 1 dog, found 0", "expected 1 cat, found 0", "expected at most 0 people, found 1")
    assert faults(wanted, {"person": found(None)}, AT) == everything


def test_words_have_their_plurals() -> None:
    names = [("car", "cars"), ("bench", "benches"), ("wine glass", "wine glasses"), ("sheep", "sheep")]
    assert [counted(name, 2) for name, _ in names] == [f"2 {plural}" for _, plural in names]
    assert counted("car", 1, "red") == "1 red car"


# ---- colours --------------------------------------------------------------------------------------------------------


def test_the_colour_of_the_surest_object_decides_whatever_the_others_are() -> None:
    wanted = wants(Clause("car", 1, "red"), task="colors")
    assert faults(wanted, {"car": found("red", "blue")}, AT) == ()
    assert faults(wanted, {"car": found("blue", "red")}, AT) == ("expected 1 red car, found blue",)


def test_every_object_that_is_asked_for_must_have_the_colour() -> None:
    wanted = wants(Clause("car", 2, "red"), task="colors")
    assert faults(wanted, {"car": found("red", "red", "blue")}, AT) == ()
    assert faults(wanted, {"car": found("red", "blue", "red")}, AT) == ("expected 2 red cars, found 1 blue and 1 red",)


def test_two_objects_with_their_colours_exchanged_are_both_wrong() -> None:
    wanted = wants(Clause("car", 1, "red"), Clause("dog", 1, "blue"), task="color_attr")
    assert faults(wanted, {"car": found("red"), "dog": found("blue")}, AT) == ()
    assert len(faults(wanted, {"car": found("blue"), "dog": found("red")}, AT)) == 2


def test_a_colour_that_nobody_told_is_not_the_one_asked_for() -> None:
    wanted = wants(Clause("car", 1, "red"), task="colors")
    assert faults(wanted, {"car": found(None)}, AT) == ("expected 1 red car, found no colour told",)


def test_a_missing_object_is_missing_and_not_of_the_wrong_colour() -> None:
    assert faults(wants(Clause("car", 1, "red")), {}, AT) == ("expected 1 red car, found 0",)


# ---- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "where"),
    [
        (-10, 0, ("left of",)),
        (10, 0, ("right of",)),
        (0, -10, ("above",)),
        (0, 10, ("below",)),
        (-10, -10, ("left of", "above")),
        (10, 10, ("right of", "below")),
        (0, 0, ()),
    ],
)
def test_places_are_as_on_a_page(x: float, y: float, where: tuple[str, ...]) -> None:
    assert relations(dot(x, y), dot(0, 0)) == where


def test_a_component_of_exactly_a_half_is_not_enough() -> None:
    # an offset of 10 is shortened by a tenth of both widths
    assert relations(centred(10, 0, 25, 0), centred(0, 0, 25, 0)) == ()
    assert relations(centred(10, 0, 25, 0), centred(0, 0, 24.9, 0)) == ("right of",)


def test_large_objects_that_nearly_share_a_centre_are_nowhere_to_each_other() -> None:
    assert relations(centred(10, 0, 60, 60), centred(0, 0, 60, 60)) == ()
    assert relations(centred(10, 0, 60, 60), centred(0, 0, 60, 60), shrink=0.0) == ("right of",)


def test_shrinking_stops_at_zero_and_never_turns_a_place_round() -> None:
    assert relations(centred(-10, 0, 300, 0), centred(0, 0, 300, 0)) == ()


def test_the_shrunk_offset_is_measured_by_the_length_it_had_before() -> None:
    # (10, 18) becomes (10, 0): 10 of 20.6, although nothing is left of the other axis
    assert relations(centred(10, 18, 0, 90), centred(0, 0, 0, 90)) == ()
    assert relations(centred(10, 8, 0, 90), centred(0, 0, 0, 90)) == ("right of",)


def placed(x: float, y: float = 0.0) -> Found:
    return Found(0.9, dot(x, y), None)


def test_a_place_is_seen_from_the_earlier_object() -> None:
    wanted = wants(Clause("cat", 1), Clause("dog", 1, None, ("left of", 0)), task="position")
    assert faults(wanted, {"cat": [placed(10)], "dog": [placed(0)]}, AT) == ()
    wrong = faults(wanted, {"cat": [placed(0)], "dog": [placed(10)]}, AT)
    assert wrong == ("expected dog left of cat, found right of it",)
    on_top = faults(wanted, {"cat": [placed(0)], "dog": [placed(0)]}, AT)
    assert on_top == ("expected dog left of cat, found neither beside, above nor below it",)


def test_only_the_surest_objects_are_placed() -> None:
    wanted = wants(Clause("cat", 1), Clause("dog", 1, None, ("left of", 0)), task="position")
    assert faults(wanted, {"cat": [placed(10), placed(-10)], "dog": [placed(0), placed(20)]}, AT) == ()
    assert faults(wanted, {"cat": [placed(-10), placed(10)], "dog": [placed(0)]}, AT)


def test_every_object_must_be_so_placed_to_every_target() -> None:
    wanted = wants(Clause("cat", 2), Clause("dog", 1, None, ("left of", 0)), task="position")
    assert faults(wanted, {"cat": [placed(10), placed(20)], "dog": [placed(0)]}, AT) == ()
    assert faults(wanted, {"cat": [placed(10), placed(-20)], "dog": [placed(0)]}, AT)


def test_nothing_is_beside_an_object_that_is_not_as_it_should_be() -> None:
    wanted = wants(Clause("cat", 1, "red"), Clause("dog", 1, None, ("left of", 0)), task="position")
    both = {"cat": [Found(0.9, dot(10, 0), "blue")], "dog": [placed(0)]}
    assert faults(wanted, both, AT) == ("expected 1 red cat, found blue", "expected dog left of cat, found no such cat")
