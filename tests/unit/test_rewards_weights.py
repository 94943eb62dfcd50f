"""A state dict belongs to one architecture: it is read as tensors alone, fits to the last one, or is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from raysteer.errors import ConfigError
from rewards.base import build_reward, check_rewards
from rewards.clip import ClipScorer, clip_parameters
from rewards.config import ClipConfig, RewardConfig
from rewards.statedict import architecture, check_state_dict
from tests.tiny_rewards import FOLDER, NAME, PROMPTS, images, named_clip, state_dict, tiny_weights

KEY = "reward.clip.pretrained"


def saved(folder: Path, state: Any, name: str = "weights.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tiny CLIP's weights with some replaced or (None) removed; "__" stands for a dot."""
    state = {**state_dict(), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def refusal(file: Path, model: str = NAME) -> str:
    tiny_weights()  # registers the architecture
    with pytest.raises(ConfigError) as caught:
        check_state_dict(model, file, KEY)
    with pytest.raises(ConfigError):
        ClipScorer(ClipConfig(model=model, pretrained=str(file)))
    line = str(caught.value)
    assert line.startswith(f"{KEY}: ") and str(file) in line and "\n" not in line
    return line


def test_hps_weights_give_the_cosine_of_their_own_model() -> None:
    """The tiny CLIP as a folder and as a named architecture with a checkpoint are one model."""
    hps = build_reward(RewardConfig(name="hps", clip=named_clip())).score(images(4), PROMPTS)
    clip = build_reward(RewardConfig(name="clip", clip=ClipConfig(model=FOLDER))).score(images(4), PROMPTS)
    assert np.array_equal(hps.total, clip.total)
    assert set(hps.parts) == {"hps"}
    assert hps.total.dtype == np.float32 and (np.abs(hps.total) <= 1.0).all()


def test_the_same_weights_steer() -> None:
    steering = build_reward(RewardConfig(name="steering", clip=named_clip())).score(images(4), PROMPTS)
    folder = build_reward(RewardConfig(name="steering", clip=ClipConfig(model=FOLDER))).score(images(4), PROMPTS)
    assert np.array_equal(steering.total, folder.total)


@pytest.mark.parametrize("form", ["bare", "checkpoint", "parallel", "safetensors", "old pickle"])
def test_weights_are_read_in_every_form_they_come_in(tmp_path: Path, form: str) -> None:
    state: Any = state_dict()
    file = tmp_path / "weights.pt"
    if form == "safetensors":
        file = tmp_path / "weights.safetensors"
        save_file(state, file)
    elif form == "old pickle":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    else:
        forms = {"bare": state, "checkpoint": {"state_dict": state, "epoch": 1}}
        saved(tmp_path, forms.get(form, {f"module.{name}": tensor for name, tensor in state.items()}))
    tiny_weights()
    check_state_dict(NAME, file, KEY)
    scorer = ClipScorer(ClipConfig(model=NAME, pretrained=str(file)))
    assert np.array_equal(scorer.encode_texts(["a"]), ClipScorer(named_clip()).encode_texts(["a"]))


def test_a_missing_a_misshapen_and_a_surplus_tensor_are_named(tmp_path: Path) -> None:
    missing = refusal(saved(tmp_path, changed(visual__proj=None)))
    assert f"it is no state dict of {NAME}: visual.proj is missing" in missing
    misshapen = refusal(saved(tmp_path, changed(text_projection=torch.zeros(16, 8))))
    assert "text_projection is [16, 8], not [16, 32]" in misshapen
    surplus = refusal(saved(tmp_path, changed(head=torch.zeros(3))))
    assert "head is too many" in surplus


def test_positions_that_open_clip_would_stretch_in_silence_are_refused(tmp_path: Path) -> None:
    """The must-fail twin: open_clip loads weights of another image size without a word."""
    other = torch.cat([state_dict()["visual.positional_embedding"]] * 2)[:26]  # 5 x 5 patches and the class
    file = saved(tmp_path, changed(visual__positional_embedding=other))
    tiny_weights()
    assert open_clip.create_model(NAME, pretrained=str(file)).visual.positional_embedding.shape == (17, 64)
    assert "visual.positional_embedding is [26, 64], not [17, 64]" in refusal(file)


def test_weights_of_another_architecture_are_refused_with_its_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in architecture("ViT-B-32").state_dict().items()}
    # one number spread over every tensor: the file stays small, the shapes are real
    file = saved(tmp_path, {name: torch.tensor(0.0).expand(shape) for name, shape in shapes.items()}, "b32.pt")
    with pytest.raises(ConfigError) as caught:
        check_state_dict("ViT-H-14", file, KEY)
    line = str(caught.value)
    assert "positional_embedding is [77, 512], not [77, 1024]" in line
    assert "set clip.model to what it was made for (ViT-B-32" in line
    check_state_dict("ViT-B-32", file, KEY)


def test_a_file_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    class Surprise:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    line = refusal(saved(tmp_path, {"state_dict": {"a": Surprise()}}))
    assert "give a file of tensors alone" in line
    assert not (tmp_path / "ran").exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Surprise()))
    refusal(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"], ids=["empty", "text", "torn"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_torn_file_is_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    assert "cannot be loaded" in refusal(file)


@pytest.mark.parametrize("state", [[1, 2], {}, {"a": 3}, {"state_dict": {}}], ids=str)
def test_a_file_without_a_state_dict_is_named(tmp_path: Path, state: Any) -> None:
    assert "it is no state dict" in refusal(saved(tmp_path, state))


@pytest.mark.parametrize("act", [build_reward, check_rewards], ids=["build", "check"])
def test_hps_is_refused_without_its_own_weights(act: Any, tmp_path: Path) -> None:
    def hps(pretrained: str, model: str = "ViT-H-14") -> RewardConfig:
        return RewardConfig(name="hps", clip=ClipConfig(model=model, pretrained=pretrained))

    with pytest.raises(
        ConfigError, match=r"reward\.clip\.pretrained: '.*HPS_v2.1_compressed.pt' .*no such weights file"
    ):
        act(hps(str(tmp_path / "HPS_v2.1_compressed.pt")))
    with pytest.raises(
        ConfigError, match=r"reward\.clip\.pretrained: 'laion2b_s32b_b79k' .*a plain CLIP \(reward clip\)"
    ):
        act(hps("laion2b_s32b_b79k"))
    with pytest.raises(
        ConfigError, match=r"HPS_tiny\.pt' .*no state dict of ViT-H-14: positional_embedding is \[24, 16\]"
    ):
        act(hps(str(tiny_weights())))


def test_parameters_are_counted_without_loading() -> None:
    assert clip_parameters(named_clip()) == sum(tensor.numel() for tensor in state_dict().values())
    assert clip_parameters(ClipConfig(model="ViT-H-14", pretrained="laion2b_s32b_b79k")) == 986_109_441
    assert clip_parameters(ClipConfig(model="hf-hub:org/name")) is None
    assert clip_parameters(ClipConfig(model="local-dir:/no/such")) is None


def test_the_tiny_architecture_is_the_folders(tmp_path: Path) -> None:
    tiny_weights()
    config = json.loads((Path(FOLDER.removeprefix("local-dir:")) / "open_clip_config.json").read_text())
    assert open_clip.get_model_config(NAME) == config["model_cfg"]
