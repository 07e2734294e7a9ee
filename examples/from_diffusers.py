"""A flow model of diffusers, trained in plain code: diagnosed, straightened and distilled from the command line.

The network is saved by its own ``save_pretrained``. The commands take that folder as it is; the student is saved as a
folder of diffusers again, and sampled there by diffusers alone.

Run: python examples/from_diffusers.py [--quick]
Needs: pip install "fewstep[diffusers]"
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

import fewstep as fs
from fewstep.cli.main import main as command_line
from fewstep.interop.diffusers_networks import save_diffusers
from fewstep.metrics.sample_distances import energy

try:
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
except ImportError as error:
    raise SystemExit('this example needs diffusers: pip install "fewstep[diffusers]"') from error

RECIPE = """
data: {{path: {folder}/digits.npy, scale: none}}
stages:
  straight: {{method: reflow, teacher: {folder}/unet, {budget}}}
  onestep: {{method: distill, teacher: {folder}/unet, init: straight, {budget}}}
compare: {{steps: [1, 4], samples: 200, diagnosis: false}}
"""


def make_unet(width: int) -> UNet2DModel:
    """The user's network, without attention: (sample, timestep) -> noise minus data, time from 1000 (noise) to 0."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (width,)}
    return UNet2DModel(8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)


def train_unet(unet: UNet2DModel, x: torch.Tensor, steps: int, batch: int) -> None:
    """Flow matching in plain code, in the convention of diffusers' own training scripts."""
    optimiser = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = x[torch.randint(0, len(x), (batch,))]
        noise, sigma = torch.randn_like(rows), torch.rand(batch)
        noisy = torch.lerp(rows, noise, sigma[:, None, None, None])
        loss = (unet(noisy, 1000 * sigma).sample - (noise - rows)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def fewstep(*words: Any) -> None:
    """Run a command of fewstep, as in a shell."""
    print("\n$ fewstep", *words)
    code = command_line([str(word) for word in words])
    if code != 0:
        raise SystemExit(f"fewstep {words[0]} ended with exit code {code}")


def sample_with_diffusers(folder: Path, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Samples of a saved network with nothing but diffusers: its own class, its own scheduler, ``steps`` steps."""
    unet = UNet2DModel.from_pretrained(folder).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = noise
    with torch.no_grad():
        for time in scheduler.timesteps:
            x = scheduler.step(unet(x, time.expand(len(x))).sample, time, x).prev_sample
    return x


def main(quick: bool = False) -> dict[str, float]:
    """Run the example; energy distances of one-call samples to the data, and the difference of both libraries."""
    torch.manual_seed(0)
    x = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    unet = make_unet(8 if quick else 24)
    train_unet(unet, x, steps=200 if quick else 300, batch=32 if quick else 100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unet.save_pretrained(folder / "unet")
        np.save(folder / "digits.npy", x.numpy())
        budget = (
            "samples: 2_500, pairs: 256, batch_size: 50, nfe: 8" if quick else "samples: 15_000, pairs: 2_000, nfe: 16"
        )
        recipe = RECIPE.format(folder=folder, budget=f"{budget}, tolerance: 1")
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        data = f"{{path: {folder}/digits.npy, scale: none}}"  # in the units that the network was trained in

        fewstep("check", folder / "unet", "--data", data)
        fewstep("diagnose", folder / "unet", "--num", 2, "--calls", "none")
        fewstep("run", folder / "recipe.yaml", "--out", folder / "out")

        student = fs.load(folder / "out" / "onestep")
        save_diffusers(student.module, folder / "unet-onestep")
        noise = torch.randn(200 if quick else 1000, 1, 8, 8)
        teacher, own = (sample_with_diffusers(folder / name, noise, 1) for name in ("unet", "unet-onestep"))
        difference = float((own - student.sample(noise=noise)).abs().max())
    energies = {"teacher": energy(teacher, x).value, "student": energy(own, x).value}
    print("\nBoth networks opened and sampled by diffusers alone, with one step of its own Euler scheduler;")
    print(f"energy distance to the digits: teacher {energies['teacher']:.3f}, student {energies['student']:.3f}.")
    print(f"The student's samples differ from those of fewstep by at most {difference:.1e}.")
    return {**energies, "difference": difference}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer samples: a few seconds, worse results")
    main(options.parse_args().quick)
