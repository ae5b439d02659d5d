"""A density trained by Lightning: an objective of pyro_flows in a LightningModule.

    python tutorials/lightning_density.py               # one process, some 20 seconds on a CPU
    python tutorials/lightning_density.py --devices 2   # two, by Lightning's own DDP

``fit_density`` needs none of this: it standardises, holds rows out, keeps the best state and runs under torchrun by
itself.  Lightning is for those whose loggers, callbacks and clusters it already knows.  Needs
``pip install 'pyro-flows[tutorials]'``.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_flows import Flow, flows
from pyro_flows.objectives import Likelihood

ENTROPY = 2.966  # nats: of the ring below, so that no density has a lower loss


class Density(L.LightningModule):
    """A flow and the loss of its rows."""

    def __init__(self, flow: Flow, lr: float = 5e-3) -> None:
        super().__init__()
        self.flow, self.objective, self.lr = flow, Likelihood(), lr

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.objective(self.flow, *batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("held_out", self.objective(self.flow, *batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def ring(number: int) -> Tensor:
    """A ring of radius 3, 0.25 wide."""
    angle, radius = 2 * torch.pi * torch.rand(number), 3 + 0.25 * torch.randn(number)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


def main(devices: int = 1, epochs: int = 10) -> float:
    """Train, and return the loss of rows held out, in nats."""
    L.seed_everything(0, verbose=False)  # the same rows in all processes
    train, held_out = (TensorDataset(part) for part in ring(10_000).split([9_000, 1_000]))
    trainer = L.Trainer(
        max_epochs=epochs,
        devices=devices,
        accelerator="cpu",  # "gpu" where there are some
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=5.0,
    )
    density = Density(flows.nsf(2, num_transforms=3, hidden_dims=(64, 64)))
    trainer.fit(density, DataLoader(train, 256 // devices, shuffle=True), DataLoader(held_out, 1_000 // devices))
    loss = trainer.callback_metrics["held_out"].item()
    if trainer.is_global_zero:
        print(f"held out: {loss:.3f} nats, of which {ENTROPY:.3f} are the ring's own entropy")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="how many processes")
    parser.add_argument("--epochs", type=int, default=10)
    main(**vars(parser.parse_args()))
