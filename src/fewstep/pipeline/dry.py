"""What a run would do: its stages, their network calls, and the minutes they take, from a few timed steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fewstep.flow.field import calls_at
from fewstep.methods.contract.options import Options
from fewstep.methods.registry import find_method
from fewstep.methods.training_pairs.generate import LADDER
from fewstep.networks import parameter_count
from fewstep.pipeline.opening import Run, network_of, open_run
from fewstep.pipeline.recipe import Recipe
from fewstep.pipeline.run import check_begun, check_models, check_networks, stage_done
from fewstep.pipeline.stage_networks import build_network
from fewstep.training.world import LocalWorld

TIMED_STEPS = 4


def show_plan(recipe: Recipe, out: Path) -> str:
    """The plan in words. Nothing is written; every network is built once and timed for a few steps."""
    run = open_run(recipe, out, LocalWorld(quiet=True))
    check_networks(run)
    check_models(run)
    check_begun(run)
    data = run.data
    kind = f"{data.classes} classes" if recipe.conditional else "unconditional"
    lines = [
        f"data     {data.name}: {len(data.train)} training and {len(data.held_out)} held-out rows of shape "
        f"{data.shape}, {kind}",
        f"out      {out}",
        "",
        f"{'stage':12} {'method':14} {'parameters':>11} {'samples':>10} {'teacher calls':>13} {'minutes':>8}",
    ]
    total = 0.0
    for name, options in recipe.stages.items():
        network = network_of(run, options)
        module = build_network(network)
        minutes = estimate(run, options, module, network.get("context", 0))
        done = stage_done(out / name)
        total += 0.0 if done else minutes
        lines.append(
            f"{name:12} {options.method:14} {parameter_count(module):11,} {options.samples:10,} "
            f"{teacher_calls(run, options):>13} {'done' if done else f'{minutes:.1f}':>8}"
        )
    threads = torch.get_num_threads()
    lines += ["", f"about {total:.1f} minutes on this machine with {threads} thread(s), then the comparison"]
    return "\n".join(lines)


def teacher_calls(run: Run, options: Options) -> str:
    """Network calls that the pairs, or training itself, cost; a range when the error gate of pairs chooses."""
    needs = find_method(options.method).needs(options)
    pairs = needs.pairs(len(run.data.train)) * calls_at(needs.guidance)
    if not pairs:
        return f"{options.samples * needs.teacher_calls:,}" if needs.teacher_calls else "–"
    if needs.pair_calls is not None:
        return f"{pairs * needs.pair_calls:,}"
    return f"{pairs * LADDER[0] / 1e6:.1f}–{pairs * LADDER[-1] / 1e6:.1f} M"


def estimate(run: Run, options: Options, module: nn.Module, context: int) -> float:
    """Minutes of a stage: training steps and teacher calls, at the speed of a few timed ones."""
    x = run.data.network_rows(run.data.train[: options.batch_size])
    t = () if find_method(options.method).makes == "features" else (torch.linspace(0, 1, len(x)),)
    cond = {"context": torch.zeros(len(x), context, *run.data.shape[1:])} if context else {}
    bf16 = options.precision == "bf16"

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out: torch.Tensor = module(x, *t, **cond).square().mean()
        return out

    trained = _seconds(lambda: forward().backward()) / len(x)
    with torch.no_grad():
        called = _seconds(lambda: module(x, *t, **cond)) / len(x)
    needs = find_method(options.method).needs(options)
    pairs = needs.pairs(len(run.data.train)) * calls_at(needs.guidance)
    calls = options.samples * needs.teacher_calls + pairs * (needs.pair_calls or 2 * LADDER[0])
    return (options.samples * trained * 1.2 + calls * called) / 60


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
