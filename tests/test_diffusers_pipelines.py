"""A pipeline's text encoders and VAE: sampling here from prompts gives the pipeline's own pictures."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from diffusers_cases import CASES, WIDTH, diffusers, pack, scheduler_times
from fewstep.errors import UserError
from fewstep.interop.diffusers_pipelines import diffusers_pipeline

transformers = pytest.importorskip("transformers", reason="text encoders of pipelines need transformers")

PROMPTS, NEGATIVE = ["a cat", "two grey dogs in snow"], "blue"
SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH}


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def tokenizer() -> Any:
    """One token per letter; unknown signs are one token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "<s>", "</s>", *string.ascii_letters, " "]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    out = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=77, **special)
    out.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return out


def t5(cls: str, config: str, width: int = WIDTH) -> Any:
    small = {"vocab_size": 64, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return getattr(transformers, cls)(getattr(transformers, config)(**small)).eval()


def gemma() -> Any:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(**SMALL, intermediate_size=16, num_key_value_heads=1, head_dim=8)
    ).eval()


def qwen3() -> Any:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(**SMALL, intermediate_size=16, num_key_value_heads=1, head_dim=8)
    ).eval()


def qwen_vl() -> Any:
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    words = {**SMALL, "intermediate_size": 16, "num_key_value_heads": 2, "rope_parameters": rope}
    sight = {"depth": 1, "hidden_size": WIDTH, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=words, vision_config=sight)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def clip(cls: str) -> Any:
    config = transformers.CLIPTextConfig(**SMALL, intermediate_size=16, projection_dim=WIDTH, eos_token_id=3)
    return getattr(transformers, cls)(config).eval()


def image_vae(channels: int = 4, factor: int = 8, **units: Any) -> Any:
    blocks = factor.bit_length()
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        **units,
    ).eval()


def video_vae(cls: str) -> Any:
    units = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.5, 0.5, 2.0, 0.7]}
    return getattr(diffusers, cls)(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **units).eval()


def deep_vae() -> Any:
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    ).eval()


SCALED = {"scaling_factor": 1.5, "shift_factor": 0.06}


def parts(name: str) -> dict[str, Any]:
    """Text encoders and VAE of a pipeline, tiny and of the class that the pipeline has."""
    text = {"tokenizer": tokenizer()}
    if name == "SD3Transformer2DModel":
        two = {"text_encoder": clip("CLIPTextModelWithProjection"), "tokenizer_2": tokenizer()}
        more = {"text_encoder_2": clip("CLIPTextModelWithProjection"), "tokenizer_3": tokenizer()}
        return {
            **text,
            **two,
            **more,
            "text_encoder_3": t5("T5EncoderModel", "T5Config", 2 * WIDTH),
            "vae": image_vae(**SCALED),
        }
    if name == "FluxTransformer2DModel":
        two = {"text_encoder": clip("CLIPTextModel"), "text_encoder_2": t5("T5EncoderModel", "T5Config")}
        return {**text, **two, "tokenizer_2": tokenizer(), "vae": image_vae(**SCALED)}
    if name == "QwenImageTransformer2DModel":
        return {**text, "text_encoder": qwen_vl(), "vae": video_vae("AutoencoderKLQwenImage")}
    if name == "WanTransformer3DModel":
        return {**text, "text_encoder": t5("UMT5EncoderModel", "UMT5Config"), "vae": video_vae("AutoencoderKLWan")}
    if name == "Lumina2Transformer2DModel":
        return {**text, "text_encoder": gemma(), "vae": image_vae(**SCALED)}
    if name == "SanaTransformer2DModel":
        return {**text, "text_encoder": gemma(), "vae": deep_vae()}
    if name == "AuraFlowTransformer2DModel":
        return {**text, "text_encoder": t5("UMT5EncoderModel", "UMT5Config"), "vae": image_vae(scaling_factor=0.13)}
    assert name == "ZImageTransformer2DModel"
    return {**text, "text_encoder": qwen3(), "vae": image_vae(**SCALED)}


TALKING = [
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "Lumina2Transformer2DModel",
    "SanaTransformer2DModel",
    "AuraFlowTransformer2DModel",
    "ZImageTransformer2DModel",
]
LONGER = {  # text lengths of these pipelines need room in the positions of their networks
    "SD3Transformer2DModel": {"joint_attention_dim": 2 * WIDTH, "pooled_projection_dim": 2 * WIDTH},
    "Lumina2Transformer2DModel": {"axes_lens": (300, 32, 32)},
    "ZImageTransformer2DModel": {"axes_lens": [1024, 32, 32]},
}


def opened(name: str) -> Any:
    case = CASES[name]
    torch.manual_seed(3)
    pipe = case.open(case.module(**LONGER.get(name, {})), **parts(name))
    return pipe


def pictures(pipe: Any, x: Tensor, steps: int, scale: float) -> Tensor:
    """The pipeline's own call from prompts: pictures (B, 3, H, W) or videos (B, 3, F, H, W) in [-1, 1]."""
    factor = {"SanaPipeline": 2}.get(type(pipe).__name__, 8)
    given: dict[str, Any] = {"height": factor * x.shape[-2], "width": factor * x.shape[-1], "latents": x.clone()}
    given |= {"num_inference_steps": steps, "guidance_scale": scale, "prompt": PROMPTS, "output_type": "pt"}
    given["negative_prompt"] = [NEGATIVE] * 2
    name = type(pipe).__name__
    if name == "FluxPipeline":
        given |= {"latents": pack(x), "true_cfg_scale": scale, "guidance_scale": 3.5}
    if name == "QwenImagePipeline":
        given |= {"latents": pack(x), "true_cfg_scale": scale, "guidance_scale": None}
    if name == "SanaPipeline":
        given |= {"use_resolution_binning": False, "negative_prompt": NEGATIVE}
    if name == "WanPipeline":
        given |= {"num_frames": 4 * (x.shape[2] - 1) + 1}
    made = pipe(**given, return_dict=False)[0]
    return 2 * (made.transpose(1, 2) if made.ndim == 5 else made) - 1


@pytest.mark.parametrize("name", TALKING)
def test_prompts_become_the_pipelines_pictures(name: str) -> None:
    pipe, case = opened(name), CASES[name]
    x = case.start(rows=2)[..., :8]
    if name.startswith("Sana"):
        x = case.start(rows=2).repeat(1, 1, 2, 2)
    scale = 3.0
    theirs = pictures(pipe, x, 2, scale)
    mine = diffusers_pipeline(pipe)
    length = {"ZImageTransformer2DModel": 512, "QwenImageTransformer2DModel": 300}.get(name)
    cond, null = mine.conditions(PROMPTS, length=length), mine.null(NEGATIVE, length=length)
    assert all(rows.shape[0] == 2 for rows in cond.values())
    assert {key: rows.shape[1:] for key, rows in cond.items()} == {key: row.shape for key, row in null.items()}
    weight = mine.weight(scale)

    def v(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        with_it, without = mine.network(x, t, **cond), mine.network(x, t, **rows)
        if mine.network.combine is not None:
            return mine.network.combine(without, with_it, weight)
        return without + weight * (with_it - without)

    rows = {key: row.expand(2, *row.shape) for key, row in null.items()}
    ours = fs.solve(v, x, grid=scheduler_times(pipe.scheduler, 2), cond=cond).x
    decoded = mine.decode(ours)
    assert decoded.shape == theirs.shape
    assert float((decoded.clamp(-1, 1) - theirs).abs().max()) < 5e-5
    assert theirs.std() > 0.01
    swapped = {key: value.flip(0) for key, value in cond.items()}
    other = mine.decode(fs.solve(v, x, grid=scheduler_times(pipe.scheduler, 2), cond=swapped).x)
    assert float((other.clamp(-1, 1) - theirs).abs().max()) > 5e-4, "the prompts do not matter"


@pytest.mark.parametrize("vae", ["kl", "deep", "AutoencoderKLWan", "AutoencoderKLQwenImage"])
def test_latents_are_in_the_networks_units(vae: str) -> None:
    torch.manual_seed(0)
    if vae == "kl":
        name, made = "SD3Transformer2DModel", image_vae(**SCALED)
    elif vae == "deep":
        name, made = "SanaTransformer2DModel", deep_vae()
    else:
        made = video_vae(vae)
        name = "WanTransformer3DModel" if vae.endswith("Wan") else "QwenImageTransformer2DModel"
    mine = diffusers_pipeline(CASES[name].open(CASES[name].module(), vae=made))
    video = name.startswith("Wan")
    given = torch.rand(2, 3, *((5,) if video else ()), 32, 32) * 2 - 1
    latents = mine.encode(given)
    assert latents.shape[:2] == (2, 4)
    assert latents.ndim == CASES[name].start().ndim
    framed = given if video or vae in ("kl", "deep") else given.unsqueeze(2)
    raw = made.encode(framed)
    raw = raw.latent if vae == "deep" else raw.latent_dist.mean
    if vae in ("kl", "deep"):
        expected = (raw - (made.config.get("shift_factor") or 0.0)) * made.config.scaling_factor
    else:
        axes = (1, 4, 1, 1, 1)
        mean, std = (torch.tensor(made.config[key]).view(axes) for key in ("latents_mean", "latents_std"))
        expected = (raw - mean) / std
    assert torch.allclose(latents, expected if video or expected.ndim == 4 else expected[:, :, 0], atol=1e-6)
    straight = made.decode(raw).sample
    straight = straight if video or vae in ("kl", "deep") else straight[:, :, 0]
    assert torch.allclose(mine.decode(latents), straight, atol=1e-4)
    if vae != "deep":
        drawn = mine.encode(given, torch.Generator().manual_seed(0))
        assert not torch.allclose(drawn, latents, atol=1e-4)
        assert torch.equal(drawn, mine.encode(given, torch.Generator().manual_seed(0)))


def test_qwen_pictures_are_the_pipelines_own() -> None:
    torch.manual_seed(0)
    case = CASES["QwenImageTransformer2DModel"]
    pipe = case.open(case.module(), vae=video_vae("AutoencoderKLQwenImage"))
    x, mask = case.start(), "encoder_hidden_states_mask"
    cond = case.cond(7)
    theirs = pipe(
        prompt_embeds=cond["encoder_hidden_states"],
        prompt_embeds_mask=cond[mask],
        latents=pack(x),
        height=64,
        width=96,
        num_inference_steps=2,
        output_type="pt",
    ).images
    mine = diffusers_pipeline(pipe)
    ours = mine.decode(fs.solve(mine.network, x, grid=scheduler_times(pipe.scheduler, 2), cond=cond).x)
    assert float(((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max()) < 1e-5
    assert theirs.std() > 0.01


def test_texts_of_several_lengths_get_one_length() -> None:
    mine = diffusers_pipeline(opened("ZImageTransformer2DModel"))
    cond = mine.conditions(PROMPTS)
    assert cond["cap_feats"].shape == (2, 21, WIDTH)
    assert cond["cap_mask"].sum(1).tolist() == [5, 21]
    longer = mine.conditions(PROMPTS[0], length=30)
    assert longer["cap_feats"].shape == (1, 30, WIDTH)
    assert longer["cap_mask"].sum().item() == 5
    x, t = CASES["ZImageTransformer2DModel"].start(rows=1), torch.full((1,), 0.3)
    a = mine.network(x, t, **longer)
    b = mine.network(x, t, **{key: rows[:1] for key, rows in cond.items()})
    assert torch.allclose(a, b, atol=1e-6)
    assert mine.conditions(PROMPTS, length=10)["cap_mask"].sum(1).tolist() == [5, 10]


def test_the_default_values_are_those_of_the_pipelines_call() -> None:
    """Wan's ``encode_prompt`` alone would give 226 tokens, and its call gives 512."""
    mine = diffusers_pipeline(opened("WanTransformer3DModel"))
    assert mine.conditions(PROMPTS)["encoder_hidden_states"].shape == (2, 512, WIDTH)
    assert mine.conditions(PROMPTS, max_sequence_length=20)["encoder_hidden_states"].shape == (2, 20, WIDTH)


def test_a_pipelines_folder_with_its_parts(tmp_path: Path) -> None:
    pipe = opened("AuraFlowTransformer2DModel")
    pipe.save_pretrained(tmp_path)
    mine, same = diffusers_pipeline(tmp_path), diffusers_pipeline(pipe)
    assert mine.shape == (4, 8, 8)
    a, b = mine.conditions(PROMPTS), same.conditions(PROMPTS)
    assert all(torch.equal(a[key], b[key]) for key in b)
    x = torch.randn(2, *mine.shape)
    assert torch.equal(mine.decode(x), same.decode(x))
    assert torch.equal(fs.from_diffusers(tmp_path)(x, torch.zeros(2), **a), mine.network(x, torch.zeros(2), **a))


def test_what_a_pipeline_lacks_is_said(tmp_path: Path) -> None:
    case = CASES["SD3Transformer2DModel"]
    bare = diffusers_pipeline(case.open(case.module()))
    with pytest.raises(UserError, match="no text_encoder"):
        bare.conditions("a cat")
    with pytest.raises(UserError, match="no vae"):
        bare.decode(case.start())
    with pytest.raises(UserError, match=r"no model_index\.json"):
        diffusers_pipeline(tmp_path)
    index: dict[str, Any] = {"_class_name": "FluxPipline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="FluxPipline"):
        diffusers_pipeline(tmp_path)
    index = {"_class_name": "FluxPipeline", "text_encoder": ["subprocess", "Popen"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="'subprocess'"):
        diffusers_pipeline(tmp_path)
    unet = diffusers.DDPMPipeline(CASES["UNet2DModel"].module(), diffusers.FlowMatchEulerDiscreteScheduler())
    assert diffusers_pipeline(unet).shape == (2, 8, 8)
    with pytest.raises(UserError, match="no text conditions"):
        diffusers_pipeline(unet).conditions("a cat")
