r"""One declaration for each class of networks of diffusers: how it is called as a velocity, and what it needs.

Their noise level is :math:`\sigma = 1 - t` with our time t (0 noise, 1 data), and most of their networks return noise
minus data:

.. math:: v(x, t) = s \, \mathrm{net}(x, c \, \tau), \qquad \tau = 1 - t \text{ or } t

with the sign s, the time scale c and the direction of :math:`\tau` of the class. Read from the pipelines and the
networks of diffusers 0.42.1; the tests compare each class with its pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError, unknown
from fewstep.interop.diffusers_calls import (
    MASK,
    POOLED,
    TEXT,
    call_dit,
    call_flux,
    call_lumina2,
    call_plain,
    call_qwen,
    call_unet,
    call_z_image,
    rescaled,
    rescaled_tokens,
)
from fewstep.networks.foreign import Combine

# forward(module, x, time, conditions, guidance): the output of the user's module, (B, C or 2 C, ...)
Forward = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor], float], Tensor]
Config = Mapping[str, Any]


def _channels(config: Config) -> tuple[int, int]:
    """Channels of the state and of the output."""
    given = config["in_channels"]
    return given, config.get("out_channels") or given


def _packed_channels(config: Config) -> tuple[int, int]:
    given, made = _channels(config)
    return given // 4, made // 4


def _qwen_channels(config: Config) -> tuple[int, int]:
    given, made = _channels(config)
    return given // 4, made


def _always(*names: str) -> Callable[[Config], tuple[str, ...]]:
    return lambda _config: names


_text = _always(TEXT)


def _label_if_embedded(config: Config) -> tuple[str, ...]:
    embedded = config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None
    return ("label",) if embedded else ()


def _labels(config: Config) -> dict[str, Any]:
    """The null label of a DiT: the row after the classes."""
    return {"label": config["num_embeds_ada_norm"]}


def _no_null(_config: Config) -> dict[str, Any]:
    """No null is known from the configuration."""
    return {}


@final
@dataclass(frozen=True)
class NetworkClass:
    """The declaration of one class.

    Attributes:
        forward: how a module of it is called.
        conditions: the conditions that it needs, from its configuration; they have the names of its own arguments. The
            exceptions are ``label`` for ``class_labels``, and ``cap_mask``, which says where ``cap_feats`` has text.
        optional: further conditions that it takes. Names that end in ``mask`` are given to it as booleans.
        time_embed: pattern of the names of the sub-modules that embed the time; ``*`` stands for a block's number.
        time_scale: the time's largest value.
        flip_time: whether its time is 1 - t (1 is noise) before scaling.
        sign: 1.0 if it returns data minus noise, -1.0 for noise minus data.
        scale_entry: name of the entry of its configuration that multiplies the time too.
        ndim: axes of its state with the batch.
        packed: whether tokens of 2 x 2 entries are made of the state.
        channels: (state, output) channels from its configuration.
        combine: its pipeline's own form of guidance; None for ``v_0 + w (v_c - v_0)``.
        null: what replaces conditions in an unconditional call, from its configuration.
        understood: entries of the configuration and the one value that this declaration is right for, with the reason.
        pipelines: pipelines of diffusers that are opened with it.
        encoded: names of what the pipeline's ``encode_prompt`` returns for a prompt, by position.
        negative: the same for the negative prompt; empty if that is encoded by a call of its own.
        weight_offset: what is added to the pipeline's guidance scale to get the weight w.
    """

    forward: Forward = call_plain
    conditions: Callable[[Config], tuple[str, ...]] = _text
    optional: tuple[str, ...] = ()
    time_embed: str = "time_text_embed.timestep_embedder"
    time_scale: float = 1000.0
    flip_time: bool = True
    sign: float = -1.0
    scale_entry: str | None = None
    ndim: int = 4
    packed: bool = False
    channels: Callable[[Config], tuple[int, int]] = _channels
    combine: Combine | None = None
    null: Callable[[Config], dict[str, Any]] = _no_null
    understood: tuple[tuple[str, Any, str], ...] = ()
    pipelines: tuple[str, ...] = ()
    encoded: tuple[str | None, ...] = ()
    negative: tuple[str | None, ...] = ()
    weight_offset: float = 0.0

    def places(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the sub-modules that embed the time."""
        return tuple(name for name, _ in module.named_modules() if fnmatchcase(name, self.time_embed))

    def shape(self, config: Config) -> tuple[int, ...] | None:
        """Shape of one sample, (C, H, W), at the size of the training; None where the configuration does not say."""
        size = config.get("sample_size")
        if size is None or self.ndim != 4:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return (self.channels(config)[0], height, width)


CLASSES: dict[str, NetworkClass] = {
    "UNet2DModel": NetworkClass(
        forward=call_unet,
        conditions=_label_if_embedded,
        time_embed="time_embedding",
        understood=(
            ("time_embedding_type", "positional", "a learned embedding needs whole times, and fourier divides by them"),
        ),
        pipelines=("DDPMPipeline",),
    ),
    "DiTTransformer2DModel": NetworkClass(
        forward=call_dit,
        conditions=_always("label"),
        time_embed="transformer_blocks.*.norm1.emb.timestep_embedder",
        null=_labels,
        pipelines=("DiTPipeline",),
    ),
    "SD3Transformer2DModel": NetworkClass(
        conditions=_always(TEXT, POOLED),
        pipelines=("StableDiffusion3Pipeline",),
        encoded=(TEXT, None, POOLED, None),
        negative=(None, TEXT, None, POOLED),
    ),
    "FluxTransformer2DModel": NetworkClass(
        forward=call_flux,
        conditions=_always(TEXT, POOLED),
        time_scale=1.0,
        packed=True,
        channels=_packed_channels,
        pipelines=("FluxPipeline",),
        encoded=(TEXT, POOLED, None),
    ),
    "QwenImageTransformer2DModel": NetworkClass(
        forward=call_qwen,
        optional=("encoder_hidden_states_mask",),
        time_scale=1.0,
        packed=True,
        channels=_qwen_channels,
        combine=rescaled_tokens,
        understood=(
            ("guidance_embeds", False, "its own pipeline cannot call it"),
            ("zero_cond_t", False, "an editing model takes a picture beside the text"),
            ("use_additional_t_cond", False, "a layered model takes one more condition"),
            ("use_layer3d_rope", False, "a layered model makes several pictures at once"),
        ),
        pipelines=("QwenImagePipeline",),
        encoded=(TEXT, "encoder_hidden_states_mask"),
    ),
    "WanTransformer3DModel": NetworkClass(
        time_embed="condition_embedder.time_embedder",
        ndim=5,
        understood=(("image_dim", None, "an image-to-video model takes a picture beside the text"),),
        pipelines=("WanPipeline",),
        encoded=(TEXT, None),
        negative=(None, TEXT),
    ),
    "Lumina2Transformer2DModel": NetworkClass(
        forward=call_lumina2,
        optional=(MASK,),
        time_embed="time_caption_embed.timestep_embedder",
        time_scale=1.0,
        flip_time=False,
        sign=1.0,
        combine=rescaled,
        pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
        encoded=(TEXT, MASK, None, None),
        negative=(None, None, TEXT, MASK),
    ),
    "SanaTransformer2DModel": NetworkClass(
        optional=(MASK,),
        time_embed="time_embed.emb.timestep_embedder",
        scale_entry="timestep_scale",
        understood=(("guidance_embeds", False, "SANA-Sprint follows a trigonometric path, not the straight one"),),
        pipelines=("SanaPipeline",),
        encoded=(TEXT, MASK, None, None),
        negative=(None, None, TEXT, MASK),
    ),
    "AuraFlowTransformer2DModel": NetworkClass(
        time_embed="time_step_proj",
        time_scale=1.0,
        pipelines=("AuraFlowPipeline",),
        encoded=(TEXT, None, None, None),
        negative=(None, None, TEXT, None),
    ),
    "ZImageTransformer2DModel": NetworkClass(
        forward=call_z_image,
        conditions=_always("cap_feats"),
        optional=("cap_mask",),
        time_embed="t_embedder",
        time_scale=1.0,
        flip_time=False,
        sign=1.0,
        pipelines=("ZImagePipeline",),
        encoded=("cap_feats", None),
        negative=(None, "cap_feats"),
        weight_offset=1.0,
    ),
}


@final
@dataclass(frozen=True)
class DiffusersCall:
    """The call of an adapter: a module of a class of :data:`CLASSES` as a velocity.

    Attributes:
        kind: the name of the class.
        time_scale: the time's largest value, without the ``scale_entry`` of the class.
        flip_time: whether its time is 1 - t.
        sign: what its output is multiplied by.
        guidance: the constant guidance input of a guidance-distilled network.
    """

    kind: str
    time_scale: float
    flip_time: bool
    sign: float
    guidance: float = 3.5

    def __call__(self, module: Any, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """The velocity, (B, ...) like ``x``.

        Raises:
            UserError: a condition is missing or not known; ``x`` has the wrong number of axes, or an odd size where
                tokens of 2 x 2 entries are made of it.
        """
        kind = CLASSES[self.kind]
        self._check(module, kind, x, cond)
        given = {name: _as_input(name, rows, module.dtype) for name, rows in cond.items()}
        out = kind.forward(module, x.to(module.dtype), self.time(module, t), given, self.guidance)
        if out.shape[1] == 2 * x.shape[1]:  # the second half is a learned variance, which a flow does not use
            out = out[:, : x.shape[1]]
        return self.sign * out

    def conditions(self, module: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the conditions that a module of the class needs, and of those that it can be given beside them."""
        kind = CLASSES[self.kind]
        return kind.conditions(module.config), kind.optional

    def time(self, module: Any, t: Tensor) -> Tensor:
        """The module's own time for times ``t`` (B,), in the dtype of ``t``: nothing is rounded to whole numbers."""
        entry = CLASSES[self.kind].scale_entry
        scale = self.time_scale * (1.0 if entry is None else module.config[entry])
        return scale * ((1.0 - t) if self.flip_time else t)

    def _check(self, module: Any, kind: NetworkClass, x: Tensor, cond: Mapping[str, Tensor]) -> None:
        needed = kind.conditions(module.config)
        for name in needed:
            if name not in cond:
                raise UserError(
                    f"{self.kind} needs the condition {name!r}: pass it, cond={{{name!r}: rows}}; in a shell, --cond "
                    "FILE.npz."
                )
        for name in cond:
            if name not in (*needed, *kind.optional):
                raise _unknown_condition(self.kind, name, (*needed, *kind.optional))
        if x.ndim != kind.ndim:
            axes = "(B, C, F, H, W)" if kind.ndim == 5 else "(B, C, H, W)"
            packed = "; it is packed into tokens here, so pass latents as the VAE has them" if kind.packed else ""
            raise UserError(f"{self.kind} takes latents {axes}, got shape {tuple(x.shape)}{packed}.")
        if kind.packed and (x.shape[-1] % 2 or x.shape[-2] % 2):
            raise UserError(f"{self.kind} makes tokens of 2 x 2 entries: {tuple(x.shape)} has an odd height or width.")


def _unknown_condition(kind: str, name: str, known: tuple[str, ...]) -> UserError:
    if not known:
        return UserError(f"this {kind} takes no conditions, and {name!r} was given: leave it out.")
    return UserError(f"{unknown('condition', name, known)} They are named as the arguments of {kind}.")


def _as_input(name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A condition in the dtype of the module's inputs; masks as booleans."""
    if name.endswith("mask"):
        return rows != 0
    return rows.to(dtype) if rows.is_floating_point() else rows
