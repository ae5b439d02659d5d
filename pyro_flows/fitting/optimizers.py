"""Choice of the optimiser: SOAP for a flow over few latents, Muon for the networks of one over many, else Adam.

On 218 latents 1,000 steps of Muon for the matrices, and of Adam for the rest, end .07 nats below log Z, and 1,200 of
SOAP .11.  Up to 32 latents 300 steps of SOAP end where 1,000 of Adam do.  Adam: A Method for Stochastic Optimization
(Kingma, Ba 2014, arXiv:1412.6980).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..training.state import Optimizer
from .muon import Muon
from .soap import SOAP


def optimizers(parameters: list[Tensor], lr: float, *, by_soap: list[Tensor], by_muon: list[Tensor]) -> list[Optimizer]:
    """Return the optimizers that together train all parameters: Adam those that none of the others does.

    Args:
        parameters: The tensors to train.
        lr: The step size.
        by_soap: What SOAP trains, if it is among them.
        by_muon: The matrices that Muon trains, if they are among them.
    """
    soap, muon = set(by_soap), set(by_muon)
    parts = [[p for p in parameters if p in soap], [p for p in parameters if p in muon - soap]]
    rest = [parameter for parameter in parameters if parameter not in soap | muon]
    found: list[Optimizer] = [torch.optim.Adam(rest, lr=lr, fused=True)] if rest else []
    kinds = (SOAP, Muon)
    return [*found, *(kind(part, lr) for kind, part in zip(kinds, parts, strict=True) if part)]
