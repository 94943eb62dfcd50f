"""Anchor sets: those we ship, those of a user, and the direction they span (never NaN)."""

import re
from pathlib import Path

import numpy as np
import pytest

from raysteer.errors import ConfigError
from rewards.anchors import load_anchors, safety_direction, shipped_anchor_sets
from rewards.config import AnchorSet, RewardConfig
from rewards.steering import SteeringReward
from tests.tiny_rewards import FOLDER, unit

HARMS = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")


def test_the_compact_sets_are_the_published_ones() -> None:
    compact, unsafe_only = load_anchors("compact"), load_anchors("unsafe_only")
    assert (len(compact.safe), len(compact.unsafe)) == (5, 3)
    assert unsafe_only == AnchorSet(safe=(), unsafe=compact.unsafe)


def test_the_scaled_set_has_25_and_20_phrases_over_the_seven_harms() -> None:
    scaled = load_anchors("scaled")
    assert (len(scaled.safe), len(scaled.unsafe)) == (25, 20)
    assert len({*scaled.safe, *scaled.unsafe}) == 45
    assert not {*scaled.safe, *scaled.unsafe} & {*load_anchors("compact").safe, *load_anchors("compact").unsafe}
    text = (Path(__file__).parents[2] / "rewards/anchor_sets/scaled.yaml").read_text(encoding="utf-8")
    headings = re.findall(r"^  # (.+)$", text.partition("unsafe:\n")[2], re.MULTILINE)
    assert tuple(headings) == HARMS
    negations = re.compile(r"\b(no|not|non|without|never)\b")
    assert not [phrase for phrase in scaled.safe if negations.search(phrase)]  # CLIP reads past a "no"


def test_every_shipped_set_spans_a_direction() -> None:
    assert shipped_anchor_sets() == ("compact", "scaled", "unsafe_only")
    for name in shipped_anchor_sets():
        v = SteeringReward(RewardConfig.model_validate({"clip": {"model": FOLDER}, "anchors": name})).v_safe
        assert v.dtype == np.float32
        assert np.linalg.norm(v) == pytest.approx(1.0, abs=1e-6)


def test_anchors_come_from_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("safe: [a safe place]\nunsafe: [a hazard, poison]\n")
    assert load_anchors(str(file)) == AnchorSet(safe=("a safe place",), unsafe=("a hazard", "poison"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("safe: [a]\nunsafe: []\n", "no unsafe phrase"),
        ("safe: []\nunsafe: []\n", "no unsafe phrase"),
        ("safe: [a]\n", "unsafe: Field required"),
        ("safe: [a]\nunsafe: [a]\n", "same phrases"),
        ("safe: [a]\nunsafe: ['  ']\n", "blank"),
        ("safe: [a]\nunsafe: [b]\nother: [c]\n", "other: Extra inputs"),
        ("safe: [a\n", "not valid YAML"),
        ("", "the file: Input should be"),
    ],
)
def test_an_empty_or_degenerate_anchor_file_is_named_never_nan(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"reward\.anchors: .*mine\.yaml.*{message}") as caught:
        load_anchors(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_anchor_set_names_those_we_ship() -> None:
    with pytest.raises(ConfigError, match=r"reward\.anchors: 'kompact' .*compact, scaled, unsafe_only"):
        load_anchors("kompact")


def test_anchors_that_embed_to_one_point_have_no_direction() -> None:
    z = unit(2)
    with pytest.raises(ConfigError, match=r"'twins' cannot be used; .*same point"):
        safety_direction(z, z[::-1], "twins")
    with pytest.raises(ConfigError, match="no unsafe phrase"):
        safety_direction(z, z[:0], "empty")
    with pytest.raises(ConfigError, match=r"reward\.anchors.*same point"):
        same = AnchorSet(safe=("A TOXIC SIGN",), unsafe=("a toxic  sign",))
        SteeringReward(RewardConfig.model_validate({"clip": {"model": FOLDER}, "anchors": same}))
