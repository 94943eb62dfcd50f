"""Adapter files: plain diffusers reproduces the policy from them, exactly, and nothing wrong loads silently."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from diffusion.adapters import (
    WEIGHTS_NAME,
    adapter_metadata,
    check_fits,
    checksum,
    fuse,
    load_adapter_file,
    save_adapter,
    save_kohya,
)
from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import generate
from raysteer.errors import ExportError, ModelError
from tests.policies import moved
from tests.tiny import tiny_pipeline

# alpha is neither the rank nor a power of two times it: a loader that forgets it is found out
CONFIG = ModelConfig(path=str(tiny_pipeline()), lora=LoRAConfig(rank=4, alpha=6.0))
PROMPTS, SEEDS = ["a toxic sign", "a red circle"], [1, 2]


@pytest.fixture(scope="module")
def trained() -> DiffusionPolicy:
    """A policy whose adapter has visibly moved."""
    return moved(DiffusionPolicy.load(CONFIG), 0.2)


def plain_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(CONFIG.path, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def unet_output(policy: DiffusionPolicy, unet: torch.nn.Module) -> torch.Tensor:
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    return unet(x, 501, encoder_hidden_states=policy.encode(PROMPTS)["embeds"], return_dict=False)[0]


def test_plain_diffusers_reproduces_the_policy_exactly(trained: DiffusionPolicy, tmp_path: Path) -> None:
    save_adapter(trained.adapter_state(), tmp_path, {"run": "demo"})
    pipe = plain_pipeline()
    base = unet_output(trained, pipe.unet)
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters()  # an adapter with unknown keys loads as nothing, with a mere warning
    theirs = unet_output(trained, pipe.unet)
    assert torch.equal(theirs, unet_output(trained, trained.denoiser))
    assert (theirs - base).abs().max() > 0.01

    start = torch.stack([torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    images = pipe(PROMPTS, latents=start, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    ours = generate(trained, PROMPTS, SEEDS, steps=4, guidance_scale=3.0)
    assert np.abs(ours.astype(int) - (images * 255).round().astype(int)).max() <= 1


def test_without_the_alpha_in_its_header_the_same_file_gives_another_model(
    trained: DiffusionPolicy, tmp_path: Path
) -> None:
    """The must-fail twin of the test above."""
    path = save_adapter(trained.adapter_state(), tmp_path)
    save_file(load_file(path), path)
    pipe = plain_pipeline()
    pipe.load_lora_weights(tmp_path)
    difference = unet_output(trained, pipe.unet) - unet_output(trained, trained.denoiser)
    assert difference.abs().max() > 1e-3


def test_a_saved_adapter_comes_back_bit_for_bit(trained: DiffusionPolicy, tmp_path: Path) -> None:
    state = trained.adapter_state()
    path = save_adapter(state, tmp_path / "new" / "folder", {"run": "demo", "version": "7"})
    assert path.name == WEIGHTS_NAME
    assert [file.name for file in path.parent.iterdir()] == [WEIGHTS_NAME]  # nothing half-written beside it
    for where in (path, path.parent):
        assert checksum(load_adapter_file(where)) == checksum(state)
        assert adapter_metadata(where) == {"run": "demo", "version": "7"}
    fresh = DiffusionPolicy.load(CONFIG, adapter_seed=9)
    fresh.load_adapter(load_adapter_file(path))
    assert torch.equal(unet_output(trained, fresh.denoiser), unet_output(trained, trained.denoiser))


def test_an_adapter_saved_by_diffusers_itself_loads_into_the_policy(trained: DiffusionPolicy, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.denoiser))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    state = load_adapter_file(tmp_path)
    assert state["unet.lora_alpha"] == [4.0]  # no header: alpha is the rank, as diffusers has it
    policy = DiffusionPolicy.load(CONFIG.model_copy(update={"lora": LoRAConfig(rank=4, alpha=4.0)}))
    policy.load_adapter(state)
    pipe = plain_pipeline()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(unet_output(policy, policy.denoiser), unet_output(policy, pipe.unet))


def test_the_checksum_sees_every_value_and_the_alpha_but_not_the_order(trained: DiffusionPolicy) -> None:
    state = trained.adapter_state()
    reference = checksum(state)
    assert checksum(dict(reversed(state.items()))) == reference
    for name in (next(iter(state)), "unet.lora_alpha"):
        changed = {key: array.copy() for key, array in state.items()}
        changed[name].flat[0] = np.nextafter(changed[name].flat[0], np.float32(9))
        assert checksum(changed) != reference
    renamed = dict(state)
    renamed["unet.other"] = renamed.pop(next(iter(state)))
    assert checksum(renamed) != reference
    assert checksum({"a": np.zeros((2, 3), np.float32)}) != checksum({"a": np.zeros((3, 2), np.float32)})


def test_the_file_is_plain_safetensors_with_the_keys_diffusers_expects(
    trained: DiffusionPolicy, tmp_path: Path
) -> None:
    path = save_adapter(trained.adapter_state(), tmp_path)
    weights = load_file(path)
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in weights)
    assert all(array.dtype == np.float32 for array in weights.values())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    lora = json.loads(header["lora_adapter_metadata"])
    assert (lora["unet.r"], lora["unet.lora_alpha"]) == (4, 6.0)


def test_a_missing_adapter_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{WEIGHTS_NAME}: no such adapter file"):
        load_adapter_file(tmp_path)


def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(b"PK\x03\x04 this is a pickle in disguise")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_adapter_file(tmp_path)


def test_a_file_without_lora_matrices_is_named(tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": np.zeros((2, 2), np.float32)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ModelError, match="holds no LoRA matrices"):
        load_adapter_file(tmp_path)


def test_half_an_adapter_state_is_not_saved(trained: DiffusionPolicy, tmp_path: Path) -> None:
    state = trained.adapter_state()
    alpha = state.pop("unet.lora_alpha")
    with pytest.raises(ModelError, match="no single …lora_alpha"):
        save_adapter(state, tmp_path)
    with pytest.raises(ModelError, match="no LoRA matrices of one rank"):
        save_adapter({"unet.lora_alpha": alpha}, tmp_path)
    assert not (tmp_path / WEIGHTS_NAME).exists()


# ---- the kohya form -------------------------------------------------------------------------------------------------


def kohya_tensors(policy: DiffusionPolicy, folder: Path) -> dict[str, np.ndarray]:
    return load_file(save_kohya(policy.adapter_state(), folder / "kohya.safetensors"))


def test_a_kohya_file_comes_back_bit_for_bit(trained: DiffusionPolicy, tmp_path: Path) -> None:
    state = trained.adapter_state()
    path = save_kohya(state, tmp_path / "new" / "mine.safetensors", {"run": "demo", "step": "7"})
    assert [file.name for file in path.parent.iterdir()] == ["mine.safetensors"]
    for where in (path, path.parent):
        assert checksum(load_adapter_file(where)) == checksum(state)
        assert adapter_metadata(where) == {"run": "demo", "step": "7"}


def test_plain_diffusers_reproduces_the_policy_from_a_kohya_file(trained: DiffusionPolicy, tmp_path: Path) -> None:
    path = save_kohya(trained.adapter_state(), tmp_path / "kohya.safetensors")
    pipe = plain_pipeline()
    pipe.load_lora_weights(str(path))
    assert torch.equal(unet_output(trained, pipe.unet), unet_output(trained, trained.denoiser))


def test_with_the_alpha_that_the_converter_writes_it_is_another_model(trained: DiffusionPolicy, tmp_path: Path) -> None:
    """The must-fail twin of the test above: diffusers' converter says alpha = rank."""
    tensors = kohya_tensors(trained, tmp_path)
    alphas = {name for name in tensors if name.endswith(".alpha")}
    assert {float(tensors[name]) for name in alphas} == {6.0}
    save_file({k: np.full_like(v, 4) if k in alphas else v for k, v in tensors.items()}, tmp_path / "wrong.safetensors")
    pipe = plain_pipeline()
    pipe.load_lora_weights(str(tmp_path / "wrong.safetensors"))
    assert (unet_output(trained, pipe.unet) - unet_output(trained, trained.denoiser)).abs().max() > 1e-3


def test_a_kohya_file_has_the_keys_and_the_header_of_sd_scripts(trained: DiffusionPolicy, tmp_path: Path) -> None:
    tensors = kohya_tensors(trained, tmp_path)
    modules = {key.split(".")[0] for key in tensors}
    assert all(module.startswith("lora_unet_") for module in modules)
    assert tensors.keys() == {
        f"{m}.{part}" for m in modules for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    raw = (tmp_path / "kohya.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "6")


@pytest.mark.parametrize("targets", [("ff.net.0.proj", "proj_in"), ("conv1", "time_emb_proj"), ("conv_in", "conv_out")])
def test_other_targets_than_attention_survive_every_form(targets: tuple[str, ...], tmp_path: Path) -> None:
    policy = moved(
        DiffusionPolicy.load(CONFIG.model_copy(update={"lora": LoRAConfig(rank=4, alpha=6.0, targets=targets)})), 0.2
    )
    expected = unet_output(policy, policy.denoiser)
    save_adapter(policy.adapter_state(), tmp_path)
    for file in (tmp_path / WEIGHTS_NAME, save_kohya(policy.adapter_state(), tmp_path / "kohya.safetensors")):
        pipe = plain_pipeline()
        pipe.load_lora_weights(str(file))
        assert torch.equal(unet_output(policy, pipe.unet), expected)
    fused = plain_pipeline().unet
    fuse(policy.adapter_state(), fused)
    assert (unet_output(policy, fused) - expected).abs().max() < 1e-5


def test_a_module_without_a_way_back_from_kohya_is_named(trained: DiffusionPolicy, tmp_path: Path) -> None:
    state = {name.replace("attn1", "my_attention"): array for name, array in trained.adapter_state().items()}
    with pytest.raises(ExportError, match=r"unet\.down_blocks.*my_attention.* has no kohya name"):
        save_kohya(state, tmp_path / "kohya.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_down.weight", np.ones((4, 8)), "a text encoder"),
        ("lora_unet_input_blocks_1_1_proj_in.lora_down.weight", np.ones((4, 8)), "original SDXL code"),
        ("lora_unet_conv_in.hada_w1_a", np.ones((4, 8)), "diffusers cannot convert"),
        ("", 2.0, r"different alphas \(2, 6\)"),
    ],
    ids=["text encoder", "sgm blocks", "lycoris", "alphas"],
)
def test_a_kohya_file_with_more_than_a_plain_lora_is_refused(
    key: str, value: object, message: str, trained: DiffusionPolicy, tmp_path: Path
) -> None:
    tensors = kohya_tensors(trained, tmp_path)
    key = key or next(name for name in tensors if name.endswith(".alpha"))
    save_file(tensors | {key: np.asarray(value, np.float32)}, tmp_path / "kohya.safetensors")
    with pytest.raises(ModelError, match=message):
        load_adapter_file(tmp_path / "kohya.safetensors")


def test_a_kohya_file_without_alphas_has_those_of_its_rank(trained: DiffusionPolicy, tmp_path: Path) -> None:
    tensors = {name: array for name, array in kohya_tensors(trained, tmp_path).items() if not name.endswith(".alpha")}
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert load_adapter_file(tmp_path / "kohya.safetensors")["unet.lora_alpha"] == [4.0]


def test_a_bfloat16_file_is_read(trained: DiffusionPolicy, tmp_path: Path) -> None:
    state = trained.adapter_state()
    halves = {k: torch.from_numpy(v).bfloat16() for k, v in state.items() if not k.endswith("lora_alpha")}
    save_tensors(halves, tmp_path / WEIGHTS_NAME)
    loaded = load_adapter_file(tmp_path)
    assert all(np.array_equal(loaded[name], half.float().numpy()) for name, half in halves.items())


@pytest.mark.parametrize("feature", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"to_q": 2}}])
def test_what_peft_can_do_and_we_cannot_is_refused(
    feature: dict[str, object], trained: DiffusionPolicy, tmp_path: Path
) -> None:
    """Loaded as a plain LoRA it would silently be another model."""
    path = save_adapter(trained.adapter_state(), tmp_path)
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in feature.items()})}
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(ModelError, match=next(iter(feature))):
        load_adapter_file(tmp_path)


def test_an_adapter_of_a_text_encoder_as_well_is_refused(trained: DiffusionPolicy, tmp_path: Path) -> None:
    path = save_adapter(trained.adapter_state(), tmp_path)
    more = {f"text_encoder.q.lora_{side}.weight": np.ones((4, 4), np.float32) for side in "AB"}
    save_file(load_file(path) | more, path)
    with pytest.raises(ModelError, match=r"text_encoder\.q\.lora_A\.weight is no LoRA matrix of the unet"):
        load_adapter_file(tmp_path)


# ---- fusing ---------------------------------------------------------------------------------------------------------


def test_a_fused_denoiser_predicts_what_base_and_adapter_predict(trained: DiffusionPolicy) -> None:
    unet = plain_pipeline().unet
    base = unet_output(trained, unet)
    fuse(trained.adapter_state(), unet)
    expected = unet_output(trained, trained.denoiser)
    assert (unet_output(trained, unet) - expected).abs().max() < 1e-5
    assert (base - expected).abs().max() > 0.01


def test_fused_under_another_alpha_it_is_another_model(trained: DiffusionPolicy) -> None:
    """The must-fail twin of the test above."""
    unet = plain_pipeline().unet
    fuse(trained.adapter_state() | {"unet.lora_alpha": np.array([4], np.float32)}, unet)
    assert (unet_output(trained, unet) - unet_output(trained, trained.denoiser)).abs().max() > 1e-3


def test_a_fused_weight_is_rounded_once(trained: DiffusionPolicy) -> None:
    unet, state = plain_pipeline().unet.half(), trained.adapter_state()
    name = next(name for name in state if name.endswith("lora_A.weight")).removesuffix(".lora_A.weight")
    weight = unet.get_parameter(f"{name.removeprefix('unet.')}.weight")
    down, up = (state[f"{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    exact = weight.detach().double().numpy() + 6.0 / 4 * up @ down
    fuse(state, unet)
    assert np.array_equal(weight.detach().numpy(), exact.astype(np.float16))


@pytest.mark.parametrize("meta", [False, True], ids=["weights", "shapes only"])
def test_an_adapter_of_another_model_names_the_module_and_changes_nothing(meta: bool, trained: DiffusionPolicy) -> None:
    unet, state = plain_pipeline().unet, trained.adapter_state()
    unet = unet.to("meta") if meta else unet
    check_fits(state, unet)
    last = sorted(name for name in state if name.endswith("lora_A.weight"))[-1]
    module = last.removeprefix("unet.").removesuffix(".lora_A.weight")
    before = None if meta else {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(ModelError, match=rf"adapts {module} of size \d+x33, but this UNet2DConditionModel has"):
        (check_fits if meta else fuse)(state | {last: np.ones((4, 33), np.float32)}, unet)
    renamed = {name.replace(module, "elsewhere.to_q"): array for name, array in state.items()}
    with pytest.raises(ModelError, match=r"adapts elsewhere\.to_q, which this UNet2DConditionModel does not have"):
        (check_fits if meta else fuse)(renamed, unet)
    if before is not None:
        assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
