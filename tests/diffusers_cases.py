"""Tiny networks of diffusers, one per class, and how each one's own pipeline samples from given embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.interop.diffusers_calls import pack, unpack
from fewstep.interop.diffusers_classes import CLASSES

diffusers = pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

ROWS, TOKENS, WIDTH = 3, 6, 16
TEXT, POOLED = "encoder_hidden_states", "pooled_projections"
Cond = dict[str, Tensor]
Call = Callable[[Any, Tensor, int, Cond, Cond | None, float], Tensor]


@dataclass(frozen=True)
class Case:
    """A class, its tiny configuration, the shape of its state, its conditions, and its pipeline."""

    name: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    pipeline: str | None = None
    call: Call | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    loud: float = 2.0  # what the weights of the time embedding are multiplied by, so that the time matters
    cond: Callable[[int], Cond] = dict

    def module(self, seed: int = 0, **changes: Any) -> Any:
        """A network with random weights, in evaluation mode, whose output depends on the time."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = getattr(diffusers, self.name)(**{**self.config, **changes}).eval()
            awaken(module)
        for place in CLASSES[self.name].places(module):
            for layer in module.get_submodule(place).modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.data.mul_(self.loud)
        return module

    def start(self, rows: int = ROWS, seed: int = 1) -> Tensor:
        return torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(seed))

    def open(self, module: Any, **further: Any) -> Any:
        """Its pipeline, without text encoders and VAE but for those that are given."""
        cls = getattr(diffusers, str(self.pipeline))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**self.scheduler)
        parts = dict.fromkeys(list(inspect.signature(cls.__init__).parameters)[1:])
        parts = {name: value for name, value in parts.items() if name not in ("boundary_ratio", "expand_timesteps")}
        pipe = cls(**{**parts, "transformer": module, "scheduler": scheduler, **further})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(
        self, pipe: Any, x: Tensor, steps: int, cond: Cond, negative: Cond | None = None, scale: float = 1.0
    ) -> Tensor:
        """The pipeline's own call from latents ``x``; latents."""
        assert self.call is not None
        return self.call(pipe, x, steps, cond, negative, scale)


def awaken(module: nn.Module) -> None:
    """Draw the parameters that are zero at the start, which would hide parts of the network."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.1)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> Cond:
    return {TEXT: normal(ROWS, TOKENS, WIDTH, seed=seed)}


def text_and_pooled(seed: int) -> Cond:
    return {**text(seed), POOLED: normal(ROWS, WIDTH, seed=seed + 50)}


def ragged() -> Tensor:
    """Masks of texts of 6, 4 and 2 tokens."""
    return (torch.arange(TOKENS) < torch.tensor([6, 4, 2])[:, None]).long()


def text_and_mask(seed: int) -> Cond:
    return {**text(seed), "encoder_attention_mask": ragged()}


def qwen_cond(seed: int) -> Cond:
    return {**text(seed), "encoder_hidden_states_mask": ragged()}


def z_cond(seed: int) -> Cond:
    return {"cap_feats": normal(ROWS, TOKENS, WIDTH, seed=seed), "cap_mask": ragged()}


def labels(seed: int) -> Cond:
    return {"label": torch.randint(0, 5, (ROWS,), generator=torch.Generator().manual_seed(seed))}


def common(x: Tensor, steps: int) -> dict[str, Any]:
    height, width = (8 * n for n in x.shape[-2:])
    return {
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "latents": x.clone(),
        "output_type": "latent",
        "return_dict": False,
    }


def call_sd3(pipe: Any, x: Tensor, steps: int, cond: Cond, negative: Cond | None, scale: float) -> Tensor:
    more = {}
    if negative is not None:
        more = {"negative_prompt_embeds": negative[TEXT], "negative_pooled_prompt_embeds": negative[POOLED]}
    given = {"prompt_embeds": cond[TEXT], "pooled_prompt_embeds": cond[POOLED], **more}
    return pipe(**common(x, steps), **given, guidance_scale=scale)[0]


def call_flux(pipe: Any, x: Tensor, steps: int, cond: Cond, negative: Cond | None, scale: float) -> Tensor:
    more = {}
    if negative is not None:
        more = {"negative_prompt_embeds": negative[TEXT], "negative_pooled_prompt_embeds": negative[POOLED]}
    given = {"prompt_embeds": cond[TEXT], "pooled_prompt_embeds": cond[POOLED], **more}
    packed = {**common(x, steps), "latents": pack(x)}
    return unpack(pipe(**packed, **given, true_cfg_scale=scale, guidance_scale=3.5)[0], *x.shape[-2:])


def call_qwen(pipe: Any, x: Tensor, steps: int, cond: Cond, negative: Cond | None, scale: float) -> Tensor:
    mask, more = "encoder_hidden_states_mask", {}
    if negative is not None:
        more = {"negative_prompt_embeds": negative[TEXT], "negative_prompt_embeds_mask": negative[mask]}
    given = {"prompt_embeds": cond[TEXT], "prompt_embeds_mask": cond[mask], **more}
    packed = {**common(x, steps), "latents": pack(x)}
    return unpack(pipe(**packed, **given, true_cfg_scale=scale)[0], *x.shape[-2:])


def call_masked(pipe: Any, x: Tensor, steps: int, cond: Cond, negative: Cond | None, scale: float) -> Tensor:
    """Lumina2, Sana and AuraFlow."""
    mask, more = "encoder_attention_mask", {}
    all_valid = torch.ones(ROWS, TOKENS, dtype=torch.long)
    if negative is not None:
        valid = negative.get(mask, all_valid)
        more = {"negative_prompt_embeds": negative[TEXT], "negative_prompt_attention_mask": valid}
    valid = cond.get(mask, all_valid)
    given = {"prompt_embeds": cond[TEXT], "prompt_attention_mask": valid, **more, **common(x, steps)}
    if type(pipe).__name__ == "SanaPipeline":
        given |= {"negative_prompt": None, "use_resolution_binning": False, "height": 32, "width": 32}
    return pipe(**given, guidance_scale=scale)[0]


def call_wan(pipe: Any, x: Tensor, steps: int, cond: Cond, negative: Cond | None, scale: float) -> Tensor:
    more = {} if negative is None else {"negative_prompt_embeds": negative[TEXT]}
    given = {**common(x, steps), "prompt_embeds": cond[TEXT], "num_frames": 4 * (x.shape[2] - 1) + 1, **more}
    return pipe(**given, guidance_scale=scale)[0]


def call_z(pipe: Any, x: Tensor, steps: int, cond: Cond, negative: Cond | None, scale: float) -> Tensor:
    """``scale`` is the pipeline's own, 0 for no guidance."""

    def texts(given: Cond) -> list[Tensor]:
        return [row[mask.bool()] for row, mask in zip(given["cap_feats"], given["cap_mask"], strict=True)]

    more = {} if negative is None else {"negative_prompt_embeds": texts(negative)}
    given = {**common(x, steps), "prompt_embeds": texts(cond), **more}
    return pipe(**given, guidance_scale=0.0 if negative is None else scale)[0]


SHIFT = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True}
CASES = {
    case.name: case
    for case in [
        Case(
            "UNet2DModel",
            {
                "sample_size": 8,
                "in_channels": 2,
                "out_channels": 2,
                "block_out_channels": (8, 16),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "num_class_embeds": 5,
                "attention_head_dim": 4,
            },
            (2, 8, 8),
            cond=labels,
        ),
        Case(
            "DiTTransformer2DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 2,
                "num_layers": 3,
                "sample_size": 8,
                "num_embeds_ada_norm": 5,
            },
            (2, 8, 8),
            cond=labels,
        ),
        Case(
            "SD3Transformer2DModel",
            {
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "caption_projection_dim": 16,
                "pooled_projection_dim": WIDTH,
                "pos_embed_max_size": 8,
            },
            (4, 8, 8),
            "StableDiffusion3Pipeline",
            call_sd3,
            SHIFT,
            cond=text_and_pooled,
        ),
        Case(
            "FluxTransformer2DModel",
            {
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "pooled_projection_dim": WIDTH,
                "axes_dims_rope": (2, 2, 4),
                "guidance_embeds": True,
            },
            (4, 8, 12),
            "FluxPipeline",
            call_flux,
            DYNAMIC,
            cond=text_and_pooled,
        ),
        Case(
            "QwenImageTransformer2DModel",
            {
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "axes_dims_rope": (2, 2, 4),
            },
            (4, 8, 12),
            "QwenImagePipeline",
            call_qwen,
            DYNAMIC,
            cond=qwen_cond,
        ),
        Case(
            "WanTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": WIDTH,
                "freq_dim": 32,
                "ffn_dim": 32,
                "num_layers": 1,
            },
            (4, 2, 8, 8),
            "WanPipeline",
            call_wan,
            SHIFT,
            cond=text,
        ),
        Case(
            "Lumina2Transformer2DModel",
            {
                "sample_size": 8,
                "in_channels": 4,
                "hidden_size": 24,
                "num_layers": 1,
                "num_refiner_layers": 1,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 8,
                "axes_dim_rope": (4, 4, 4),
                "axes_lens": (32, 32, 32),
                "cap_feat_dim": WIDTH,
            },
            (4, 8, 8),
            "Lumina2Pipeline",
            call_masked,
            DYNAMIC,
            cond=text_and_mask,
        ),
        Case(
            "SanaTransformer2DModel",
            {
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 1,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 8,
                "cross_attention_dim": 16,
                "caption_channels": WIDTH,
                "sample_size": 8,
                "timestep_scale": 0.5,
            },
            (4, 8, 8),
            "SanaPipeline",
            call_masked,
            SHIFT,
            cond=text_and_mask,
        ),
        Case(
            "AuraFlowTransformer2DModel",
            {
                "sample_size": 8,
                "in_channels": 4,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "caption_projection_dim": 16,
                "pos_embed_max_size": 64,
            },
            (4, 8, 8),
            "AuraFlowPipeline",
            call_masked,
            loud=3.0,
            cond=text,
        ),
        Case(
            "ZImageTransformer2DModel",
            {
                "in_channels": 4,
                "dim": 32,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": WIDTH,
                "axes_dims": [4, 4, 8],
                "axes_lens": [64, 32, 32],
            },
            (4, 8, 8),
            "ZImagePipeline",
            call_z,
            SHIFT,
            loud=1.0,
            cond=z_cond,
        ),
    ]
}
PIPED = [name for name, case in CASES.items() if case.pipeline]


def scheduler_times(scheduler: Any, steps: int) -> tuple[float, ...]:
    """The times of our grid for a scheduler that has been set to ``steps``."""
    assert len(scheduler.sigmas) == steps + 1
    return tuple((1.0 - np.asarray(scheduler.sigmas, dtype=np.float64)).tolist())
