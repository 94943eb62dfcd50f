"""FID, KID and CLIP score: against closed forms and the library, and what is refused or withheld."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.detectors.inception import encode, extractor_id
from evaluation.distances import GROUPS, frechet, frechet_figure, kernel_figure, symmetric_root
from evaluation.suites.base import Findings
from evaluation.suites.coco import Coco, CocoConfig
from raysteer.errors import ConfigError, PromptError

needs_package = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="needs the extra fid")
WHO = {"features": 4, "weights_sha256": "0" * 64, "resize": "clean"}
HEADER = "image_id,source,prompt,evaluation_seed\n"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def with_statistics(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int = 0) -> np.ndarray:
    """float [n, d] whose sample mean and covariance are exactly these."""
    x = rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)))
    return x @ whiten.T @ np.linalg.cholesky(covariance).T + mean


def covariance(d: int, seed: int) -> np.ndarray:
    a = rng(seed).standard_normal((d, d))
    return a @ a.T / d + 0.1 * np.eye(d)


# ---- the distances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, 400], ids=["fewer than features", "more"])
def test_frechet_is_the_closed_form_of_two_gaussians_that_commute(n: int) -> None:
    """For diagonal covariances: |m - mu|^2 + sum (s - t)^2 of the standard deviations."""
    d = 6 if n > 100 else 8  # n - 1 = d: the smallest full rank
    mean, other = rng(1).standard_normal(d), rng(2).standard_normal(d)
    s, t = rng(3).uniform(0.5, 2.0, d), rng(4).uniform(0.5, 2.0, d)
    x = with_statistics(n, mean, np.diag(s**2))
    expected = ((mean - other) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet(x, other, symmetric_root(np.diag(t**2))) == pytest.approx(expected, rel=1e-9)


def test_frechet_to_the_own_statistics_is_zero() -> None:
    for n in (5, 12, 300):  # of deficient rank too
        x = rng(5).standard_normal((n, 8))
        own = frechet(x, x.mean(axis=0), symmetric_root(np.cov(x, rowvar=False)))
        assert own == pytest.approx(0.0, abs=1e-6)


def test_frechet_is_the_same_by_either_gram_matrix() -> None:
    """Rows of zeros beside the mean change nothing but which of the two is smaller."""
    d = 40
    x, root, mean = rng(6).standard_normal((30, d)), symmetric_root(covariance(d, 7)), rng(8).standard_normal(d)
    s = np.cov(x, rowvar=False)
    values = np.linalg.eigvals(s @ root @ root).real.clip(min=0.0)
    expected = ((x.mean(0) - mean) ** 2).sum() + np.trace(s) + np.trace(root @ root) - 2 * np.sqrt(values).sum()
    assert frechet(x, mean, root) == pytest.approx(expected, rel=1e-6)


@needs_package
def test_frechet_is_the_librarys() -> None:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    x, y = rng(9).standard_normal((500, 16)), rng(10).standard_normal((300, 16)) * 1.5 + 0.2
    one, other = ({"mu": z.mean(axis=0), "sigma": np.cov(z, rowvar=False)} for z in (x, y))
    expected = fid_statistics_to_metric(one, other, verbose=False)["frechet_inception_distance"]
    figure = frechet_figure(x, np.arange(500), other["mu"], other["sigma"])
    assert figure.value == pytest.approx(expected, rel=1e-9)


@needs_package
def test_kernel_distance_is_the_librarys_over_one_subset_of_all_images() -> None:
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = rng(11).standard_normal((60, 8)), rng(12).standard_normal((60, 8)) + 0.3
    options = {"kid_subsets": 1, "kid_subset_size": 60, "rng_seed": 0, "verbose": False}
    expected = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **options)
    assert kernel_figure(x, np.arange(60), y).value == pytest.approx(expected["kernel_inception_distance_mean"])


def test_kernel_distance_is_unbiased_at_every_count_and_frechet_is_not() -> None:
    real = rng(13).standard_normal((400, 4))
    mean, root = np.zeros(4), np.eye(4)
    few = [rng(100 + i).standard_normal((24, 4)) for i in range(60)]
    kernel = [kernel_figure(x, np.arange(24), real).value for x in few]
    assert abs(np.mean(kernel)) < 2.5 * np.std(kernel) / math.sqrt(len(kernel)) + 0.02
    assert min(kernel) < 0.0
    assert np.mean([frechet(x, mean, root) for x in few]) > 5 * np.mean(
        [frechet(rng(i).standard_normal((400, 4)), mean, root) for i in range(10)]
    )


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_the_standard_error_is_the_spread_over_new_samples(distance: str) -> None:
    real = rng(14).standard_normal((200, 3)) + 0.5

    def figure(seed: int) -> Any:
        x, prompt = rng(1000 + seed).standard_normal((100, 3)), np.arange(100)
        if distance == "kernel":
            return kernel_figure(x, prompt, real)
        return frechet_figure(x, prompt, real.mean(axis=0), np.cov(real, rowvar=False))

    figures = [figure(seed) for seed in range(60)]
    spread = np.std([f.value for f in figures])
    assert 0.75 < np.mean([f.standard_error for f in figures]) / spread < 1.33
    assert all(f.low < f.value < f.high for f in figures)


def test_images_of_one_prompt_leave_the_jackknife_together() -> None:
    """Else copies of an image would make an interval narrower that holds no more information."""
    x = rng(15).standard_normal((60, 3))
    twice, prompt = np.repeat(x, 2, axis=0), np.repeat(np.arange(60), 2)
    once = frechet_figure(x, np.arange(60), np.zeros(3), np.eye(3))
    both = frechet_figure(twice, prompt, np.zeros(3), np.eye(3))
    assert both.standard_error == pytest.approx(once.standard_error, rel=0.05)
    with pytest.raises(ValueError, match="19 prompts are too few"):
        frechet_figure(x, np.arange(60) % 19, np.zeros(3), np.eye(3))


# ---- the suite ------------------------------------------------------------------------------------------------------


def captions(folder: Path, n: int, header: str = HEADER) -> str:
    file = folder / "coco.csv"
    file.write_text(header + "".join(f"{i:012d},coco-30k,a house {i},{41000 + i}\n" for i in range(n)))
    return str(file)


def reference(folder: Path, n: int = 64, features: bool = True, who: dict[str, Any] | None = WHO) -> str:
    import json

    rows = rng(20).standard_normal((n, 4)).astype(np.float32)
    arrays: dict[str, Any] = {"mu": rows.mean(axis=0, dtype=float), "sigma": np.cov(rows, rowvar=False)}
    if features:
        arrays["features"] = rows
    if who is not None:
        arrays["extractor"] = np.array(json.dumps(who))
    np.savez(folder / "reference.npz", **arrays)
    return str(folder / "reference.npz")


def verdicts(n: int, d: int = 4, who: dict[str, Any] = WHO, seed: int = 21) -> list[dict[str, Any]]:
    rows = rng(seed).standard_normal((n, d))
    return [
        {"clip": {"text": i / 100, "base": 1.0}, "inception": {"extractor": extractor_id(who), "features": encode(row)}}
        for i, row in enumerate(rows)
    ]


def suite(folder: Path, n: int, limit: int | None = None, **config: Any) -> Coco:
    return Coco(CocoConfig(file=captions(folder, n), **config), 7, limit)


def find(folder: Path, n: int, **config: Any) -> Findings:
    return suite(folder, n, reference=reference(folder), fid_least_images=GROUPS, **config).find(verdicts(n), 100)


def test_captions_and_seeds_are_those_of_the_file(tmp_path: Path) -> None:
    asks = suite(tmp_path, 3).asks
    assert [ask.prompt for ask in asks] == ["a house 0", "a house 1", "a house 2"]
    assert [ask.seeds for ask in asks] == [(41000,), (41001,), (41002,)]
    assert not any(ask.unsafe for ask in asks)


def test_a_caption_may_span_lines_and_hold_commas_as_some_of_coco_do(tmp_path: Path) -> None:
    file = tmp_path / "coco.csv"
    file.write_text(HEADER + '1,coco-30k,"A dog, watching tv\n",64297\n2,coco-30k,A cat,1\n')
    asks = Coco(CocoConfig(file=str(file)), 7).asks
    assert asks[0].prompt.strip() == "A dog, watching tv" and asks[0].seeds == (64297,)
    assert asks[1].prompt == "A cat"


def test_without_a_seed_column_seeds_are_derived_and_the_protocol_says_so(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("caption\na house\na cat\n")
    one, other = (Coco(CocoConfig(file=str(file)), seed) for seed in (7, 8))
    assert one.asks[0].seeds != one.asks[1].seeds and one.asks[0].seeds != other.asks[0].seeds
    assert one.protocol()["seeds_from"] == "evaluation.seed"
    assert suite(tmp_path, 3).protocol()["seeds_from"] == "evaluation_seed"


def test_a_limit_keeps_each_captions_seed(tmp_path: Path) -> None:
    every = {ask.prompt: ask.seeds for ask in suite(tmp_path, 9, images_per_prompt=2).asks}
    few = suite(tmp_path, 9, limit=4, images_per_prompt=2).asks
    assert len(few) == 4 and all(every[ask.prompt] == ask.seeds for ask in few)
    assert all(len(set(ask.seeds)) == 2 for ask in few)


def test_all_three_figures_are_given_and_fid_is_the_headline(tmp_path: Path) -> None:
    found = find(tmp_path, 40)
    assert list(found.figures) == ["fid", "kid", "clip_score"]
    assert set(found.figures) <= set(Coco.meanings)
    assert found.figures["clip_score"].value == pytest.approx(0.195)
    assert found.samples["clip_score"].values == tuple(i / 100 for i in range(40))
    assert len(found.seen) == 40 and found.counts == {"prompts": 40, "images": 40}


def test_kid_is_given_times_a_thousand(tmp_path: Path) -> None:
    found = find(tmp_path, 40)
    rows = np.stack([rng(21).standard_normal((40, 4))]).reshape(40, 4).astype(np.float32)
    real = rng(20).standard_normal((64, 4)).astype(np.float32)
    plain = kernel_figure(rows, np.arange(40), real)
    assert found.figures["kid"].value == pytest.approx(1000 * plain.value)
    assert found.figures["kid"].standard_error == pytest.approx(1000 * plain.standard_error)


def test_too_few_images_have_no_fid_and_the_count_says_how_many_are_missing(tmp_path: Path) -> None:
    own = suite(tmp_path, 40, reference=reference(tmp_path))
    found = own.find(verdicts(40), 100)
    assert list(found.figures) == ["kid", "clip_score"]
    assert found.counts["images_short_of_fid"] == 2048 - 40


def test_one_prompt_has_a_clip_score_alone(tmp_path: Path) -> None:
    own = suite(tmp_path, 1, reference=reference(tmp_path))
    found = own.find(verdicts(1), 100)
    assert list(found.figures) == ["clip_score"]
    assert found.counts["prompts_short_of_fid_and_kid"] == GROUPS - 1


def test_a_reference_of_statistics_alone_gives_fid_and_no_kid(tmp_path: Path) -> None:
    path = reference(tmp_path, features=False, who=None)
    own = suite(tmp_path, 30, reference=path, fid_least_images=GROUPS)
    found = own.find(verdicts(30), 100)
    assert list(found.figures) == ["fid", "clip_score"]
    assert found.counts["reference_features_short_of_kid"] > 0
    assert own.protocol()["reference_extractor"] == own.protocol()["reference_images"] == "not stated"


def test_without_a_reference_nobody_computes_features(tmp_path: Path) -> None:
    own = suite(tmp_path, 3)
    assert own.detectors == ("clip",)
    found = own.find([{"clip": {"text": 0.3, "base": 1.0}}] * 3, 100)
    assert list(found.figures) == ["clip_score"] and found.figures["clip_score"].value == pytest.approx(0.3)
    assert suite(tmp_path, 3, reference=reference(tmp_path)).detectors == ("clip", "inception")


def test_the_cap_of_kid_is_part_of_the_protocol_and_holds(tmp_path: Path) -> None:
    few, all_of_them = find(tmp_path, 60, kid_most_images=30), find(tmp_path, 60)
    assert few.figures["kid"].n == 30 and all_of_them.figures["kid"].n == 60
    assert few.figures["fid"] == all_of_them.figures["fid"]
    assert suite(tmp_path, 3, reference=reference(tmp_path), kid_most_images=30).protocol()["kid_most_images"] == 30


def test_features_of_another_network_or_resizing_are_refused(tmp_path: Path) -> None:
    own = suite(tmp_path, 30, reference=reference(tmp_path))
    with pytest.raises(ConfigError, match=r"^evaluation\.coco\.reference: .*another resizing"):
        own.find(verdicts(30, who={**WHO, "resize": "tensorflow"}), 100)
    own = suite(tmp_path, 30, reference=reference(tmp_path, who=None))
    with pytest.raises(ConfigError, match="it has 4 features for an image, these images have 5"):
        own.find(verdicts(30, d=5), 100)


def test_the_protocol_tells_another_file_and_another_reference(tmp_path: Path) -> None:
    one = suite(tmp_path, 3, reference=reference(tmp_path)).protocol()
    other = suite(tmp_path, 3, reference=reference(tmp_path, n=65)).protocol()
    third = suite(tmp_path, 4, reference=reference(tmp_path, n=65)).protocol()
    assert one["reference_images"] == 64 and one["reference_extractor"] == WHO
    assert one["reference_sha256"] != other["reference_sha256"]
    assert other["file_sha256"] != third["file_sha256"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt,categories,inappropriate_percentage\na,hate,3\n",
            r"inappropriate_percentage is one of I2P's.*suite i2p",
        ),
        (
            "text\na house\n",
            r"no column of a known name; its columns are: text; name the right one in evaluation\.coco\.column",
        ),
        ("prompt,caption\na,b\n", r"prompt, caption"),
        (HEADER + "1,coco-30k,,5\n", "its prompt is empty"),
        (HEADER + "1,coco-30k,a house,x\n", "its evaluation_seed is 'x'"),
        (HEADER, "holds no prompts"),
    ],
)
def test_a_file_that_is_not_of_captions_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(PromptError, match=message):
        Coco(CocoConfig(file=str(tmp_path / "p.csv")), 7)


def test_a_missing_reference_is_refused_with_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^evaluation\.coco\.reference: .*python -m evaluation\.detectors\.inception"
    ):
        suite(tmp_path, 3, reference=str(tmp_path / "no.npz"))
