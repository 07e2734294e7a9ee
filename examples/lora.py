"""Distil a transformer of diffusers through LoRA: teacher and student are one frozen base and a small adapter.

A small SD3 transformer is built from a configuration and gets random weights, so nothing is downloaded. Its flow is
solved with 16 calls, a student with a LoRA adapter learns the end points in one call, and the adapter is exported in
the names that peft and diffusers read.

Run: python examples/lora.py [--quick]   (needs the extras diffusers and lora)
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor

import fewstep as fs
from fewstep.interop.lora import lora_state, merge

TEXT, WIDTH = 6, 16  # tokens of a prompt, and values of an embedding


def transformer() -> torch.nn.Module:
    """A small SD3 transformer with random weights."""
    try:
        from diffusers import SD3Transformer2DModel
    except ImportError as error:
        raise SystemExit("this example needs diffusers: pip install 'fewstep[diffusers,lora]'") from error
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def rows(num: int) -> dict[str, Tensor]:
    """Latents with embeddings of their prompts, as a text encoder would give them."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(num, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(num, TEXT, WIDTH, generator=generator),
        "pooled_projections": torch.randn(num, WIDTH, generator=generator),
    }


def main(quick: bool = False) -> dict[str, float]:
    """Run the example; errors of one call against the flow, before and after, and the share of trained weights."""
    net = fs.from_diffusers(transformer())
    named = ("encoder_hidden_states", "pooled_projections")
    data = fs.as_data(rows(1000), conditions=list(named), layout="image", scale="none", name="latents")
    teacher = fs.lora(net, rank=8)
    sizes = {"samples": 8_000, "pairs": 500} if quick else {"samples": 60_000, "pairs": 4_000}
    with tempfile.TemporaryDirectory() as folder:
        # the weights are random, so there is no convention to check
        student = fs.train("distill", teacher=teacher, data=data, out=f"{folder}/few", batch_size=64, nfe=16,
                           tolerance=1.0, check=False, **sizes)  # fmt: skip
    trained = sum(p.numel() for p in student.module.parameters())
    share = trained / sum(p.numel() for p in net.inner.parameters())

    cond = data.cond_rows(data.held_out[:64], named)
    x0 = torch.randn(len(cond[named[0]]), 4, 8, 8)
    flow = fs.solve(net, x0, steps=32, solver="rk4", cond=cond).x
    errors = {}
    for name, velocity in (("teacher", net), ("student", student.module)):
        errors[name] = float((fs.solve(velocity, x0, steps=1, cond=cond).x - flow).square().mean().sqrt())
    print(f"the adapter has {trained:,} weights, {share:.1%} of the network's")
    print(
        f"one call against the flow, root mean square: teacher {errors['teacher']:.3f}, student {errors['student']:.3f}"
    )
    whole = merge(student.module)  # the class of diffusers, with the adapter added to its weights
    same = (
        fs.solve(fs.from_diffusers(whole), x0, steps=1, cond=cond).x
        - fs.solve(student.module, x0, steps=1, cond=cond).x
    )
    print(f"merged: a {type(whole).__name__}; adapter file: {len(lora_state(student.module, 'transformer'))} tensors")
    print(f"its samples differ from the student's by at most {float(same.abs().max()):.1e}")
    return {**errors, "share": share, "difference": float(same.abs().max())}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer samples: a few seconds, worse results")
    main(options.parse_args().quick)
