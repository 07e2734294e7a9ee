"""What a run would do: its stages, their network calls, and their minutes, estimated from a few timed batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.flow.field import calls_at
from fewstep.flow.noise import isolated_rng
from fewstep.methods.contract.options import Options
from fewstep.methods.training_pairs.generate import LADDER
from fewstep.networks import parameter_count
from fewstep.networks.foreign import FOREIGN, Foreign, trainable_copy
from fewstep.pipeline.bf16_speed import bf16_is_slow, bf16_note
from fewstep.pipeline.checks import check_begun, check_run, slow_in_bf16, stage_done
from fewstep.pipeline.opening import Run, open_run
from fewstep.pipeline.recipe import Recipe
from fewstep.pipeline.timing import TimedNetwork, Timing, blank_network, fill, time_networks
from fewstep.training.world import LocalWorld

TIMING_SECONDS = 2.5  # of timing in all; with loading the data, --dry is to answer within five
OVERHEAD = 1.2  # a training step over its forward and backward: optimiser, average and batch; chosen, not tuned


def show_plan(recipe: Recipe, out: Path, foreign: Sequence[Foreign] = ()) -> str:
    """The plan as text. Nothing is written; networks are timed for :data:`TIMING_SECONDS` in all.

    Args:
        recipe: the recipe.
        out: the run folder.
        foreign: networks that fewstep did not build, as for :func:`~fewstep.pipeline.opening.open_run`.
    """
    run = open_run(recipe, out, LocalWorld(quiet=True), foreign)
    check_run(run)
    check_begun(run)
    data = run.data
    kind = f"{data.classes} classes" if recipe.conditional else "unconditional"
    lines = [
        f"data     {data.name}: {len(data.train)} training and {len(data.held_out)} held-out rows of shape "
        f"{data.shape}, {kind}",
        f"out      {out}",
        "",
        f"{'stage':12} {'method':14} {'parameters':>11} {'samples':>10} {'other calls':>13} {'minutes':>8}",
    ]
    minutes = stage_minutes(run)
    for name, options in recipe.stages.items():
        done = f"{minutes[name]:.1f}" if name in minutes else "done"
        lines.append(
            f"{name:12} {options.method:14} {parameter_count(student_form(run, name)):11,} "
            f"{options.samples:10,} {other_calls(run, name, options):>13} {done:>8}"
        )
    device, threads = run.world.device, torch.get_num_threads()
    where = f"with {threads} thread(s)" if device.type == "cpu" else f"on its {device.type} device"
    total = sum(minutes.values())
    lines += [
        "",
        f"about {total:.1f} minutes on this machine {where}, then the comparison (estimated from small batches)",
    ]
    if slow := slow_in_bf16(run):
        lines += [bf16_note(device, slow), "      These stages' minutes are those of fp32."]
    return "\n".join(lines)


def stage_minutes(run: Run) -> dict[str, float]:
    """Minutes of every stage that is not finished; equal networks are timed once."""
    left = {name: options for name, options in run.recipe.stages.items() if not stage_done(run.out / name)}
    works: dict[str, TimedNetwork] = {}
    keys: dict[str, str] = {}
    for name, options in left.items():
        bf16 = options.precision == "bf16" and not bf16_is_slow(run.world.device)
        keys[name] = key = json.dumps([run.network(name), bf16], sort_keys=True)
        batch = max(options.batch_size, works[key].batch if key in works else 1)
        timed = run.method(name).makes != "features"
        build, cond = partial(student_network, run, name), partial(condition_rows, run, name)
        works[key] = TimedNetwork(build, cond, run.data.shape, batch, timed, run.world.device, bf16)
    timings = time_networks(works, TIMING_SECONDS)
    return {name: estimate(run, name, options, timings[keys[name]]) for name, options in left.items()}


def student_form(run: Run, name: str) -> nn.Module:
    """The network of a stage, to count its parameters: without memory for its weights where fewstep builds it."""
    network = run.network(name)
    if network.get("name") != FOREIGN:
        return blank_network(network)
    found = run.prototype(network)
    with isolated_rng():
        return found.with_interval() if network.get("two_time") and not found.two_time else found


def student_network(run: Run, name: str) -> nn.Module:
    """A network like the one that a stage trains, on the run's device; its weights have no meaning."""
    network = run.network(name)
    if network.get("name") == FOREIGN:
        with isolated_rng():
            return trainable_copy(run.prototype(network), bool(network.get("two_time"))).to(run.world.device)
    made = blank_network(network).to_empty(device=run.world.device)
    fill(made)
    return made


def condition_rows(run: Run, name: str, count: int) -> dict[str, Tensor]:
    """Conditions that the network of a stage is called with, each (count, ...): those of the first training rows."""
    network, device = run.network(name), run.world.device
    if network.get("name") == FOREIGN:
        rows = run.data.train[np.arange(count) % len(run.data.train)]
        return {key: value.to(device) for key, value in run.data.cond_rows(rows, run.conditions).items()}
    context = network.get("context", 0)
    return {"context": torch.zeros(count, context, *run.data.shape[1:], device=device)} if context else {}


def other_calls(run: Run, name: str, options: Options) -> str:
    """Network calls that the pairs, or training itself, cost; a range when the error gate of pairs chooses."""
    needs = run.method(name).needs(options)
    pairs = needs.pairs(len(run.data.train)) * calls_at(needs.guidance)
    if not pairs:
        return f"{options.samples * needs.other_calls:,}" if needs.other_calls else "–"
    if needs.pair_calls is not None:
        return f"{pairs * needs.pair_calls:,}"
    return f"{pairs * LADDER[0] / 1e6:.1f}–{pairs * LADDER[-1] / 1e6:.1f} M"


def estimate(run: Run, name: str, options: Options, timing: Timing) -> float:
    """Minutes of a stage: training steps and teacher calls, at the speed of a few timed ones."""
    needs = run.method(name).needs(options)
    pairs = needs.pairs(len(run.data.train)) * calls_at(needs.guidance)
    calls = options.samples * needs.other_calls + pairs * (needs.pair_calls or 2 * LADDER[0])
    trained = options.samples * timing.trained(options.batch_size)
    return (trained * OVERHEAD + calls * timing.called) / 60
