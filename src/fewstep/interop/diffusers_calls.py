"""How modules of diffusers are called: tokens, ids, shapes and lists made of x, and guidance in their pipelines' form.

A module is called as ``forward(module, x, time, conditions, guidance)``. Whatever has no batch axis (ids of tokens,
shapes) is made here, so that every condition has one row per sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TEXT, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
Conditions = Mapping[str, Tensor]


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens of 2 x 2 entries, (B, H W / 4, 4 C)."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`: tokens (B, H W / 4, 4 C) as latents (B, C, H, W)."""
    b, _, c = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def rescaled(v0: Tensor, vc: Tensor, weight: float) -> Tensor:
    """Guidance of Lumina2: ``v_0 + w (v_c - v_0)``, rescaled to the norm of ``v_c`` over the last axis (the width)."""
    v = v0 + weight * (vc - v0)
    smallest = torch.finfo(v.dtype).tiny
    return v * (vc.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True).clamp_min(smallest))


def rescaled_tokens(v0: Tensor, vc: Tensor, weight: float) -> Tensor:
    """Guidance of QwenImage: :func:`rescaled`, over the 4 C entries of each token of 2 x 2 latent pixels."""
    return unpack(rescaled(pack(v0), pack(vc), weight), v0.shape[-2], v0.shape[-1])


def call_plain(module: nn.Module, x: Tensor, time: Tensor, cond: Conditions, _guidance: float) -> Tensor:
    """A call with the names that most classes use; (B, C or 2 C, ...)."""
    return module(hidden_states=x, timestep=time, return_dict=False, **cond)[0]


def call_unet(module: nn.Module, x: Tensor, time: Tensor, cond: Conditions, _guidance: float) -> Tensor:
    """UNet2DModel: the time is a tensor, because it rounds a number to a whole one."""
    return module(sample=x, timestep=time, class_labels=cond.get("label"), return_dict=False)[0]


def call_dit(module: nn.Module, x: Tensor, time: Tensor, cond: Conditions, _guidance: float) -> Tensor:
    """DiTTransformer2DModel, with its labels."""
    return module(hidden_states=x, timestep=time, class_labels=cond["label"], return_dict=False)[0]


def call_flux(module: Any, x: Tensor, time: Tensor, cond: Conditions, guidance: float) -> Tensor:
    """FluxTransformer2DModel: tokens, with the places of picture and text; ``guidance`` where it is embedded."""
    height, width = x.shape[-2:]
    rows, columns = torch.meshgrid(
        torch.arange(height // 2, device=x.device), torch.arange(width // 2, device=x.device), indexing="ij"
    )
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    scale = torch.full_like(time, guidance) if module.config.guidance_embeds else None
    tokens = module(
        hidden_states=pack(x),
        timestep=time,
        guidance=scale,
        img_ids=places.to(x.dtype),
        txt_ids=x.new_zeros(cond[TEXT].shape[1], 3),
        return_dict=False,
        **cond,
    )[0]
    return unpack(tokens, height, width)


def call_qwen(module: nn.Module, x: Tensor, time: Tensor, cond: Conditions, _guidance: float) -> Tensor:
    """QwenImageTransformer2DModel: tokens, with the shape of every picture."""
    height, width = x.shape[-2:]
    shapes = [[(1, height // 2, width // 2)]] * x.shape[0]
    tokens = module(hidden_states=pack(x), timestep=time, img_shapes=shapes, return_dict=False, **cond)[0]
    return unpack(tokens, height, width)


def call_lumina2(module: nn.Module, x: Tensor, time: Tensor, cond: Conditions, guidance: float) -> Tensor:
    """Lumina2Transformer2DModel: without a mask, all of the text is valid."""
    text = cond[TEXT]
    mask = cond.get(MASK, torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))
    return call_plain(module, x, time, {TEXT: text, MASK: mask}, guidance)


def call_z_image(module: nn.Module, x: Tensor, time: Tensor, cond: Conditions, _guidance: float) -> Tensor:
    """ZImageTransformer2DModel: lists of pictures of one frame and of texts, each of its own length."""
    texts = list(cond["cap_feats"].unbind(0))
    if "cap_mask" in cond:
        texts = [text[valid] for text, valid in zip(texts, cond["cap_mask"], strict=True)]
    return torch.stack(module(list(x.unsqueeze(2).unbind(0)), time, texts, return_dict=False)[0]).squeeze(2)
