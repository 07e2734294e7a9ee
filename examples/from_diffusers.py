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
from fewstep.store.files import read_json

try:
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
except ImportError as error:
    raise SystemExit('this example needs diffusers: pip install "fewstep[diffusers]"') from error

RECIPE = """
data: {{path: {folder}/digits.npy, scale: none}}
stages:
  straight: {{method: reflow, teacher: {folder}/unet, {budget}}}
  onestep: {{method: distill, teacher: {folder}/unet, init: straight, {budget}}}
compare: {{steps: [1, 4], samples: {samples}, diagnosis: false}}
"""


def make_unet() -> UNet2DModel:
    """The user's network, without attention: (sample, timestep) -> noise minus data, time from 1000 (noise) to 0."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    return UNet2DModel(8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, **blocks)


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
    """Run the example and return energy distances to the data by model and number of calls."""
    torch.manual_seed(0)
    x = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    unet = make_unet()
    train_unet(unet, x, steps=100 if quick else 600, batch=32 if quick else 128)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unet.save_pretrained(folder / "unet")
        np.save(folder / "digits.npy", x.numpy())
        budget = "samples: 2_500, pairs: 256, batch_size: 50" if quick else "samples: 40_000, pairs: 4_000"
        recipe = RECIPE.format(folder=folder, budget=f"{budget}, nfe: 16, tolerance: 1", samples=100 if quick else 1000)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")

        fewstep("check", folder / "unet", "--data", f"{{path: {folder}/digits.npy, scale: none}}")
        fewstep("diagnose", folder / "unet", "--num", 2 if quick else 32, "--calls", "none")
        fewstep("run", folder / "recipe.yaml", "--out", folder / "out")
        fewstep("sample", folder / "out" / "onestep", "--num", 16, "--out", folder / "samples.npy")

        student = fs.load(folder / "out" / "onestep")
        save_diffusers(student.module, folder / "unet-onestep")
        print(
            "\nthe student as a folder of diffusers:", sorted(path.name for path in (folder / "unet-onestep").iterdir())
        )
        noise = torch.randn(4, 1, 8, 8)
        difference = float(
            (sample_with_diffusers(folder / "unet-onestep", noise, 1) - student.sample(noise=noise)).abs().max()
        )
        print(f"one step of diffusers' own Euler scheduler: differs from fewstep by {difference:.1e}")
        rows = read_json(folder / "out" / "compare.json")["rows"]
    figures = {f"{row['model']} {row.get('steps', '')}".strip(): row["scores"]["energy"] for row in rows}
    return {**figures, "difference": difference}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer samples: a few seconds, worse results")
    main(options.parse_args().quick)
