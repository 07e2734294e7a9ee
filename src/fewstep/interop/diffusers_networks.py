"""Networks of diffusers as adapters, from a folder, a module or a pipeline, and back into a folder.

Loading runs no code of the folder: the class comes from :data:`~fewstep.interop.diffusers_classes.CLASSES`, weights
are read from safetensors files only, and nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.flow.noise import isolated_rng
from fewstep.interop.diffusers_classes import CLASSES, DiffusersCall, NetworkClass
from fewstep.interop.diffusers_folders import (
    check_flow,
    check_scheduler,
    component_of,
    find_class,
    load_network,
    unknown_class,
)
from fewstep.networks.adapter import Adapter
from fewstep.networks.foreign import Intervals
from fewstep.store.files import atomic_file, json_round_trip, make_folder, read_json, write_json
from fewstep.store.tensors import read_tensors, unshared

CONVENTION = "fewstep_convention.json"  # beside saved weights: what the user said of time and sign
INTERVALS = "fewstep_intervals.safetensors"  # beside saved weights: the functions of r - t of a two-time network
RECORD = "diffusers"  # key of a description under which a network of diffusers is recorded
TRAINED_TIMES = 1000  # of every scheduler, unless its configuration has another number


def from_diffusers(
    source: str | Path | nn.Module | Any,
    *,
    component: str | None = None,
    null: Mapping[str, Any] | None = None,
    time_scale: float | None = None,
    flip_time: bool | None = None,
    sign: float | None = None,
    guidance_embed: float = 3.5,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Adapter:
    """A network of diffusers as a velocity ``v(x, t, **cond)`` that every function and method here takes.

    =========================== =============== ==================================================================
    class                       x               conditions
    =========================== =============== ==================================================================
    UNet2DModel                 (B, C, H, W)    ``label`` (B,) if it embeds classes
    DiTTransformer2DModel       (B, C, H, W)    ``label`` (B,)
    SD3Transformer2DModel       (B, C, H, W)    ``encoder_hidden_states`` (B, L, D), ``pooled_projections`` (B, P)
    FluxTransformer2DModel      (B, C, H, W)    the same
    QwenImageTransformer2DModel (B, C, H, W)    ``encoder_hidden_states``, ``encoder_hidden_states_mask`` (B, L)
    WanTransformer3DModel       (B, C, F, H, W) ``encoder_hidden_states``
    Lumina2Transformer2DModel   (B, C, H, W)    ``encoder_hidden_states``, ``encoder_attention_mask`` (B, L)
    SanaTransformer2DModel      (B, C, H, W)    ``encoder_hidden_states``, ``encoder_attention_mask`` (B, L)
    AuraFlowTransformer2DModel  (B, C, H, W)    ``encoder_hidden_states``
    ZImageTransformer2DModel    (B, C, H, W)    ``cap_feats`` (B, L, D), ``cap_mask`` (B, L)
    =========================== =============== ==================================================================

    Masks may be left out. Flux and QwenImage take latents as the VAE has them: tokens, ids and shapes are made here. A
    user's time t is 0 for noise and 1 for data; the module gets its own (:mod:`fewstep.interop.diffusers_classes`).

    **Guidance.** Weight w = 1 is the conditional field, as everywhere here, and w is the ``guidance_scale`` of the
    pipeline (``true_cfg_scale`` of Flux and QwenImage); for Z-Image w is its ``guidance_scale + 1``. The guided
    velocities of QwenImage and Lumina2 are rescaled to the norm of the conditional one, as their pipelines do; set
    ``adapter.combine = None`` for the plain form.

    **UNet2DModel and DiTTransformer2DModel** have no convention of their own. The default is that of flow matching in
    diffusers, ``-net(x, 1000 (1 - t))``: the output is noise minus data.

    >>> import torch, fewstep as fs
    >>> from diffusers import UNet2DModel
    >>> shape = dict(block_out_channels=(8,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    >>> module = UNet2DModel(in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **shape)
    >>> net = fs.from_diffusers(module)
    >>> fs.solve(net, torch.randn(2, 1, 8, 8), steps=4).x.shape
    torch.Size([2, 1, 8, 8])
    >>> net.inner is module
    True

    Args:
        source: a folder with a saved network or a saved pipeline, a module of a class above, or a pipeline. A folder is
            on this machine: nothing is downloaded.
        component: the pipeline's part that is the network; ``transformer`` or ``unet`` by default.
        null: what replaces conditions in an unconditional call, by name: a number, or a tensor of one row's shape. A
            DiT's null label is known. For text it is the embedding of the negative prompt
            (:meth:`~fewstep.interop.diffusers_pipelines.DiffusersPipeline.null`).
        time_scale: the largest value of the module's time.
        flip_time: whether the module's time is 1 - t before it is scaled: 1 is noise.
        sign: 1.0 if the module returns data minus noise, -1.0 for noise minus data.
        guidance_embed: the constant ``guidance`` input of a Flux network with ``guidance_embeds``.
        dtype: of the weights that are read from a folder. Modules and pipelines keep theirs.
        variant: of the weights that are read from a folder, such as ``fp16``.

    Returns:
        The adapter; ``.inner`` is the module itself, not a copy. The two-time form is restored from a folder that
        :func:`save_diffusers` wrote. :func:`~fewstep.interop.diffusers_pipelines.diffusers_pipeline` also gives a
        pipeline's text encoders and VAE.

    Raises:
        UserError: no such folder; a class, a configuration or a scheduler that is not known as a flow; weights that are
            not in safetensors files.
        MissingExtra: diffusers is not installed.
    """
    module, scheduler, folder = _open(source, component, dtype, variant)
    name = class_name(module)
    kind = CLASSES[name]
    _check_understood(module, name, kind)
    if scheduler is not None:
        check_flow(scheduler)
    said = {"time_scale": time_scale, "flip_time": flip_time, "sign": sign}
    saved = read_json(folder / CONVENTION) if folder is not None and (folder / CONVENTION).is_file() else {}
    made = {**_defaults(kind, scheduler), **saved, **{key: value for key, value in said.items() if value is not None}}
    adapter = Adapter(
        module,
        DiffusersCall(name, guidance=float(guidance_embed), **made),
        time_embed=kind.places(module),
        null={**kind.null(module.config), **(null or {})},
        combine=kind.combine,
    )
    adapter.record = {RECORD: record_of(adapter)}
    if folder is not None and (folder / INTERVALS).is_file():
        _read_intervals(adapter, folder / INTERVALS)
    return adapter


def save_diffusers(adapter: Adapter, folder: str | Path, pipeline: Any = None, component: str | None = None) -> Path:
    """Save an adapter's network in the format of diffusers: the user's own class, with its own ``save_pretrained``.

    A time scale, a direction or a sign that is not the class's own is written beside the weights, and so are the
    functions of ``r - t`` of a two-time network; :func:`from_diffusers` reads both. **The class alone does not know
    them: the weights of a two-time network, loaded by diffusers, are not the flow map that was trained.**

    Args:
        adapter: made by :func:`from_diffusers`, or a trained copy of it.
        folder: written to; made where it is missing.
        pipeline: a pipeline whose other parts are saved too, with the network in its place; it is not changed.
        component: the pipeline's part that is the network; ``transformer`` or ``unet`` by default.

    Returns:
        The folder that holds the network.

    Raises:
        UserError: the network is of another kind, or the folder cannot be written to.
    """
    if not isinstance(adapter, Adapter) or not isinstance(adapter.call, DiffusersCall):
        raise UserError("save_diffusers saves what fs.from_diffusers made, or a trained copy of it; use fs.Generator.")
    place = make_folder(folder)
    if pipeline is None:
        adapter.wrapped.save_pretrained(place)  # type: ignore[operator]
    else:
        name = component or component_of({key: value is not None for key, value in pipeline.components.items()})
        place = make_folder(place / name)
        own = copy.copy(pipeline)
        own.register_modules(**{name: adapter.wrapped})
        own.save_pretrained(folder)
    call, kind = adapter.call, CLASSES[adapter.call.kind]
    convention = {"time_scale": call.time_scale, "flip_time": call.flip_time, "sign": call.sign}
    (place / CONVENTION).unlink(missing_ok=True)
    (place / INTERVALS).unlink(missing_ok=True)
    if convention != _defaults(kind, None):
        write_json(place / CONVENTION, convention)
    if adapter.intervals is not None:
        _write_intervals(adapter.intervals, place / INTERVALS)
    return place


def record_of(adapter: Adapter) -> dict[str, Any]:
    """The plain values from which :func:`rebuilt` makes the network of an adapter again, without its weights."""
    call, module = adapter.call, adapter.wrapped
    assert isinstance(call, DiffusersCall), "an adapter of a network of diffusers"
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}  # type: ignore[union-attr,operator]
    numbers = {name: value for name, value in adapter.null.items() if isinstance(value, int | float)}
    made: dict[str, Any] = json_round_trip({"config": config, "call": vars(call), "null": numbers})
    return made


def rebuilt(description: Mapping[str, Any]) -> Adapter | None:
    """The network that a description of a model belongs to, with random weights; None where it is none of diffusers, or
    a role, whose frozen base the description does not hold.

    The class comes from :data:`~fewstep.interop.diffusers_classes.CLASSES`, so that no code of a folder is run.

    Raises:
        UserError: a class that is not known, or that the installed version does not have.
        MissingExtra: diffusers is not installed.
    """
    if RECORD not in description or "lora" in description:
        return None
    record = description[RECORD]
    name = str(record["call"]["kind"])
    if name not in CLASSES:
        raise unknown_class(name)
    with isolated_rng():
        module = find_class(name).from_config(dict(record["config"]))
    convention = {key: record["call"][key] for key in ("time_scale", "flip_time", "sign")}
    made = from_diffusers(module.eval(), null=record["null"], guidance_embed=record["call"]["guidance"], **convention)
    if not description.get("two_time"):
        return made
    with isolated_rng():
        return made.with_interval()


def class_name(module: Any) -> str:
    """The name in :data:`CLASSES` of a module's class, or of a class that it inherits from.

    Raises:
        UserError: there is none.
    """
    for cls in type(module).__mro__:
        if cls.__name__ in CLASSES and cls.__module__.startswith("diffusers."):
            return cls.__name__
    raise unknown_class(type(module).__name__)


def is_pipeline(source: Any) -> bool:
    """Whether an object is a pipeline of diffusers, told without importing it."""
    return any(cls.__name__ == "DiffusionPipeline" for cls in type(source).__mro__)


def _defaults(kind: NetworkClass, scheduler: Mapping[str, Any] | None) -> dict[str, Any]:
    """Time scale, direction and sign of a class; networks see the scheduler's times, of which 1000 is usual."""
    times = TRAINED_TIMES if scheduler is None else scheduler.get("num_train_timesteps", TRAINED_TIMES)
    scale = kind.time_scale * (times / TRAINED_TIMES if kind.flip_time else 1.0)
    return {"time_scale": scale, "flip_time": kind.flip_time, "sign": kind.sign}


def _open(
    source: Any, component: str | None, dtype: torch.dtype, variant: str | None
) -> tuple[Any, Mapping[str, Any] | None, Path | None]:
    """The module, the scheduler's configuration where there is one, and the folder where there is one."""
    if isinstance(source, (str, Path)):
        return _open_folder(Path(source), component, dtype, variant)
    if is_pipeline(source):
        parts = source.components
        name = component or component_of({key: value is not None for key, value in parts.items()})
        if parts.get(name) is None:
            raise UserError(f"this pipeline has no part {name!r}; its parts are {', '.join(parts)}.")
        scheduler = source.scheduler
        return parts[name], {**scheduler.config, "_class_name": type(scheduler).__name__}, None
    return source, None, None


def _open_folder(
    folder: Path, component: str | None, dtype: torch.dtype, variant: str | None
) -> tuple[Any, Mapping[str, Any] | None, Path]:
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {str(folder)!r}. from_diffusers reads folders of this machine and downloads nothing: "
            f"give the path of a saved pipeline or network (from the hub: hf download {folder} --local-dir DIR)."
        )
    if not (folder / "model_index.json").is_file():
        if component is not None:
            raise UserError(f"component={component!r} is a part of a pipeline, and {folder} is no saved pipeline.")
        return load_network(folder, dtype, variant), None, folder
    index = read_json(folder / "model_index.json")
    name = component or component_of({key: isinstance(v, list) and v[0] for key, v in index.items()})
    found = check_scheduler(folder)  # before gigabytes of weights are read
    return load_network(folder / name, dtype, variant), found, folder / name


def _check_understood(module: Any, name: str, kind: NetworkClass) -> None:
    """Refuse configurations that take or return something else than a velocity of the state."""
    config = module.config
    for entry, value, why in kind.understood:
        if config.get(entry, value) != value:
            raise UserError(f"this {name} has {entry}={config[entry]!r}: {why}. Describe it with fs.adapt.")
    given, made = kind.channels(config)
    if made not in (given, 2 * given):
        raise UserError(
            f"this {name} takes {given} channels and returns {made}: part of its input is no state of the flow (a "
            "picture or a mask to start from). Describe it with fs.adapt, with that part as a condition."
        )


def _write_intervals(intervals: Intervals, path: Path) -> None:
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file(unshared({name: value.cpu() for name, value in intervals.state_dict().items()}), temporary)


def _read_intervals(adapter: Adapter, path: Path) -> None:
    with isolated_rng():
        adapter.intervals = Intervals(adapter.places, adapter.widths)
    try:
        adapter.intervals.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network beside it: save both again.") from error
