"""A pipeline of diffusers around its network: text to conditions, latents to pictures and back, its own times."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.interop.diffusers_classes import CLASSES, NetworkClass
from fewstep.interop.diffusers_folders import load_class
from fewstep.interop.diffusers_networks import class_name, from_diffusers, is_pipeline
from fewstep.networks.adapter import Adapter
from fewstep.store.files import read_json

LIBRARIES = {"diffusers", "transformers"}  # whose classes a pipeline's folder may name


@final
@dataclass(frozen=True)
class DiffusersPipeline:
    """What is around a network in a pipeline of diffusers.

    Attributes:
        network: the velocity, ``v(x, t, **cond)`` on latents.
        pipeline: the pipeline of diffusers, with its ``vae``, text encoders and ``scheduler``.
        kind: the declaration of the network's class.
    """

    network: Adapter
    pipeline: Any
    kind: NetworkClass

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one sample of latents, (C, H, W), at the size of the training; None where it is not recorded."""
        module: Any = self.network.wrapped
        return self.kind.shape(module.config)

    def conditions(
        self, prompts: str | Sequence[str], *, length: int | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """The conditions of prompts, by the pipeline's own text encoders.

        Args:
            prompts: one text, or B of them.
            length: pad or cut texts to this many tokens. Most pipelines return one length for all texts; QwenImage and
                Z-Image do not, and there the longest text of the call decides unless ``length`` is given. Give the same
                length in every call whose rows are to be put into one batch.
            options: of the pipeline's ``encode_prompt``; its default values are those of the pipeline's call.

        Returns:
            Tensors by name, (B, ...), without gradients: ``cond=`` of everything that samples or trains.

        Raises:
            UserError: the pipeline has no text encoder.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        with torch.no_grad():
            made = self._encode(prompt=texts, do_classifier_free_guidance=False, **options)
        return self._named(self.kind.encoded, made, length)

    def null(self, prompt: str = "", *, length: int | None = None, **options: Any) -> dict[str, Tensor]:
        """What replaces the conditions in an unconditional call: the pipeline's negative prompt, encoded.

        Args:
            prompt: the negative prompt.
            length: as in :meth:`conditions`.
            options: as in :meth:`conditions`.

        Returns:
            Tensors by name, each of one row's shape, for ``fs.from_diffusers(…, null=…)`` or
            ``pipeline.network.null.update(…)``.

        Raises:
            UserError: the pipeline has no text encoder.
        """
        if not self.kind.negative:
            return {name: rows[0] for name, rows in self.conditions(prompt, length=length, **options).items()}
        with torch.no_grad():
            made = self._encode(prompt=[""], negative_prompt=[prompt], do_classifier_free_guidance=True, **options)
        return {name: rows[0] for name, rows in self._named(self.kind.negative, made, length).items()}

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), or videos (B, 3, F, H, W), around [-1, 1], of latents in the units of the network.

        Raises:
            UserError: the pipeline has no VAE.
        """
        vae = self._part("vae")
        scale, shift = _latent_units(vae, latents)
        plain = (latents * scale + shift).to(vae.dtype)
        with torch.no_grad():
            made = vae.decode(plain.unsqueeze(2) if self._one_frame else plain, return_dict=False)[0]
        return made[:, :, 0] if self._one_frame else made

    def encode(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents in the units of the network, of pictures (B, 3, H, W), or videos (B, 3, F, H, W), in [-1, 1].

        Args:
            pictures: floating point.
            generator: draws the latents from the VAE's distribution; None gives its mean.

        Raises:
            UserError: the pipeline has no VAE.
        """
        vae = self._part("vae")
        given = (pictures.unsqueeze(2) if self._one_frame else pictures).to(vae.dtype)
        with torch.no_grad():
            made = vae.encode(given, return_dict=False)[0]
        if not isinstance(made, Tensor):
            made = made.mode() if generator is None else made.sample(generator)
        made = made[:, :, 0] if self._one_frame else made
        scale, shift = _latent_units(vae, made)
        return ((made - shift) / scale).to(pictures.dtype)

    def weight(self, guidance_scale: float) -> float:
        """The weight w here for a guidance scale of the pipeline: the same, but for Z-Image, where it is scale + 1."""
        return guidance_scale + self.kind.weight_offset

    @property
    def _one_frame(self) -> bool:
        """Whether the VAE is one for videos and the latents are pictures."""
        return self.kind.ndim == 4 and type(self._part("vae")).__name__ in (
            "AutoencoderKLQwenImage",
            "AutoencoderKLWan",
        )

    def _part(self, name: str) -> Any:
        found = self.pipeline.components.get(name)
        if found is None:
            raise UserError(f"this pipeline has no {name}: open one that has, or work with latents and embeddings.")
        return found

    def _encode(self, **given: Any) -> tuple[Any, ...]:
        """The pipeline's ``encode_prompt``, whose missing arguments get the default values of the pipeline's call."""
        if not self.kind.encoded:
            raise UserError(f"{type(self.pipeline).__name__} has no text conditions.")
        self._part("text_encoder")
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        usual = inspect.signature(self.pipeline.__call__).parameters
        made = {name: usual[name].default for name in known if name in usual and name != "prompt"}
        made |= {name: value for name, value in given.items() if name in known or name not in _SWITCHES}
        return self.pipeline.encode_prompt(**made)

    def _named(self, names: tuple[str | None, ...], made: tuple[Any, ...], length: int | None) -> dict[str, Tensor]:
        values = {name: value for name, value in zip(names, made, strict=True) if name is not None}
        if "cap_feats" in values:  # a list of texts, each of its own length
            values = _padded(values["cap_feats"])
        if "encoder_hidden_states_mask" in values and values["encoder_hidden_states_mask"] is None:
            text = values["encoder_hidden_states"]  # all of it is valid
            values["encoder_hidden_states_mask"] = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        if length is None:
            return values
        return {
            name: rows if rows.ndim == 2 and "mask" not in name else _cut(rows, length) for name, rows in values.items()
        }


_SWITCHES = ("do_classifier_free_guidance", "negative_prompt")  # not every encode_prompt has them


def diffusers_pipeline(
    source: str | Path | Any, *, dtype: torch.dtype = torch.float32, variant: str | None = None, **options: Any
) -> DiffusersPipeline:
    """Open a pipeline of diffusers with its text encoders and VAE.

    >>> from fewstep.interop.diffusers_pipelines import diffusers_pipeline
    >>> opened = diffusers_pipeline("stable-diffusion-3")  # doctest: +SKIP
    >>> cond = opened.conditions(["a cat", "a dog"])  # doctest: +SKIP
    >>> x = fs.solve(opened.network, torch.randn(2, *opened.shape), steps=20, cond=cond).x  # doctest: +SKIP
    >>> pictures = opened.decode(x)  # doctest: +SKIP

    Args:
        source: a folder with a saved pipeline, or a pipeline. A folder is on this machine: nothing is downloaded, and
            none of its code runs.
        dtype: of the weights that are read from a folder.
        variant: of the weights that are read from a folder, such as ``fp16``.
        options: of :func:`~fewstep.interop.diffusers_networks.from_diffusers`.

    Raises:
        UserError: no saved pipeline; a pipeline or a part of it that is not known here.
        MissingExtra: diffusers is not installed.
    """
    pipeline = source if is_pipeline(source) else _load(Path(source), dtype, variant)
    network = from_diffusers(pipeline, **options)
    return DiffusersPipeline(network, pipeline, CLASSES[class_name(network.wrapped)])


def _load(folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} is no saved pipeline: it has no model_index.json. fs.from_diffusers reads a network."
        )
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    known = [pipeline for kind in CLASSES.values() for pipeline in kind.pipelines]
    if name not in known:
        raise UserError(f"the pipeline {name!r} is not known here; known: {', '.join(known)}.")
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and entry[0] not in LIBRARIES:
            raise UserError(
                f"the part {part!r} of {folder} is of {entry[0]!r}: loading it would run code that comes from the "
                "folder. Load the pipeline with diffusers if you trust it, and pass the pipeline."
            )
    return load_class(name, folder, dtype, variant)


def _latent_units(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift with which the VAE's latents are ``network's latents * scale + shift``."""
    config: Mapping[str, Any] = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        return like.new_tensor(1.0 / scale), like.new_tensor(shift)
    axes = (1, -1, *(1,) * (like.ndim - 2))
    return like.new_tensor(std).view(axes), like.new_tensor(mean).view(axes)


def _padded(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Texts of their own lengths, each (L, D), as rows of one length, and a mask of the tokens that are text."""
    rows = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(text) for text in texts], device=rows.device)
    return {"cap_feats": rows, "cap_mask": torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]}


def _cut(rows: Tensor, length: int) -> Tensor:
    """Rows (B, L, ...) with ``length`` instead of L: cut, or padded with zeros at the end."""
    kept = rows[:, :length]
    missing = length - kept.shape[1]
    return torch.cat([kept, kept.new_zeros(kept.shape[0], missing, *kept.shape[2:])], dim=1) if missing else kept
