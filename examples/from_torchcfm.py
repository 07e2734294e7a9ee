"""A torchcfm U-Net, trained by a plain loop: check it, distil it to one call, compare, and take its own class back.

Run: python examples/from_torchcfm.py [--quick]
Needs: pip install torchcfm
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits

import fewstep as fs

try:
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel
except ImportError as error:
    raise SystemExit("this example needs torchcfm: pip install torchcfm") from error

NULL = 10  # the label that stands for "no label": the network embeds 11


def make_unet() -> UNetModel:
    """The user's network.

    Its group norms have 32 groups. With 32 channels that is one channel per group, and the norm removes the embeddings
    of time and label, which are added before it: the network would be blind to both. ``use_scale_shift_norm`` applies
    them after the norm; 64 channels also help. ``fs.check_velocity`` finds a blind network.
    """
    width = {"num_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "use_scale_shift_norm": True}
    return UNetModel(dim=(1, 8, 8), class_cond=True, num_classes=NULL + 1, **width)


def train_unet(net: UNetModel, x: torch.Tensor, labels: torch.Tensor, steps: int, batch: int) -> None:
    """Flow matching with torchcfm alone; one label in ten is replaced by the null label, for guidance."""
    matcher = ConditionalFlowMatcher(sigma=0.0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    net.train()
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,))
        y = torch.where(torch.rand(batch) < 0.1, NULL, labels[rows])
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.randn_like(x[rows]), x[rows])
        loss = (net(t, x_t, y) - u_t).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def main(quick: bool = False) -> dict[str, float]:
    """Run the example and return energy distances to the data by model and number of calls."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    labels = torch.as_tensor(digits.target)
    unet = make_unet()
    train_unet(unet, x, labels, steps=80 if quick else 400, batch=32 if quick else 128)

    net = fs.adapt(unet, "torchcfm", null={"label": NULL})  # torchcfm calls (t, x, y); here it is v(x, t, label=...)
    data = fs.as_data({"x": x, "label": labels}, scale="none", name="digits")  # in the units that it was trained in
    print(fs.check_velocity(net, data, rows=64 if quick else None))

    with tempfile.TemporaryDirectory() as folder:
        budget = (
            {"samples": 2500, "pairs": 256, "batch_size": 50, "nfe": 8}
            if quick
            else {"samples": 30_000, "pairs": 2000, "nfe": 16}
        )
        one = fs.train("distill", teacher=net, data=data, out=f"{folder}/onecall", tolerance=1.0, **budget)
        print("one sample of every digit:", tuple(one.sample(10, label=list(range(10)), seed=0).shape))

        count = 100 if quick else 1000
        found = fs.compare([net, one], data, steps=[1, 16], samples=count, diagnosis=False)
        print(found.table)

        # the student is the user's class with the user's names: no fewstep is needed to load it
        torch.save(one.inner.state_dict(), f"{folder}/student.pt")
        own = make_unet()
        own.load_state_dict(torch.load(f"{folder}/student.pt"), strict=True)
    own.eval()
    noise, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        samples = noise + own(torch.zeros(4), noise, y)  # one Euler step from t = 0 to t = 1
    difference = float((samples - one.sample(noise=noise, label=y.tolist())).abs().max())
    print(f"one call of their own class without fewstep: differs by {difference:.1e}")
    figures = {f"{row['model']} {row.get('steps', '')}".strip(): row["scores"]["energy"] for row in found.rows}
    return {**figures, "difference": difference}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer samples: a few seconds, worse results")
    main(options.parse_args().quick)
