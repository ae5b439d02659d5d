"""Tasks of ``speed.py``, for our flows and for their bare matrix products.

Every contender has ``LAYERS`` layers, with networks of the same widths, and scores the same batch.  Weights are the
initial ones of each library; their values do not change the work.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

LAYERS, HIDDEN, BINS, BOUND = 5, [128, 128], 8, 5.0
AUTOREGRESSIVE = "maf", "iaf", "nsf_ar"
FLOWS = [*AUTOREGRESSIVE, "nsf", "realnvp"]
TASKS = ["log-prob", "step", "sample", "slow step"]
OURS, COMPILED, FLOWJAX, FLOOR = "pyro_flows", "pyro_flows compiled", "flowjax (jit)", "floor"

# A contender maps each task to a function without arguments.
Contender = dict[str, Callable[[], object]]


class Case(NamedTuple):
    """Flow to build: it has ``x.shape[1]`` features, scores ``x`` and draws as many rows."""

    flow: str
    x: Tensor

    @property
    def dim(self) -> int:
        return self.x.shape[1]

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def splines(self) -> bool:
        return self.flow.startswith("nsf")

    @property
    def scores_fast(self) -> bool:
        return self.flow != "iaf"


def is_slow(flow: str, task: str) -> bool:
    """True if the task runs the direction of an autoregressive flow that computes one feature after the other."""
    return flow in AUTOREGRESSIVE and task in ("slow step", "log-prob" if flow == "iaf" else "sample")


def is_too_large(case: Case, task: str) -> bool:
    """True if a library that inverts by D passes would take a minute (D² rows of work) or 20 GB (D stored graphs)."""
    if not is_slow(case.flow, task):
        return False
    size = case.dim * case.batch * (BINS if case.splines else 1)
    return size > 200_000 if task == "slow step" else size * case.dim > 70_000_000


def contender(
    case: Case,
    log_prob: Callable[[Tensor], Tensor],
    sample: Callable[[], Tensor],
    sample_and_log_prob: Callable[[], Tensor],
    parameters: list[Tensor],
) -> Contender:
    """Return the four tasks of a torch library, from its three functions."""

    def descend(loss: Tensor) -> None:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()

    def score() -> None:
        with torch.no_grad():
            log_prob(case.x.clone())

    def draw() -> None:
        with torch.no_grad():
            sample()

    def score_step() -> None:
        descend(-log_prob(case.x.clone()).mean())

    def draw_step() -> None:
        descend(sample_and_log_prob().mean())

    fast, slow = (score_step, draw_step) if case.scores_fast else (draw_step, score_step)
    return {"log-prob": score, "step": fast, "sample": draw, "slow step": slow}


def ours(case: Case) -> Contender:
    """Return the tasks of our flow."""
    return of_flow(our_flow(case), case)


def compiled(case: Case) -> Contender:
    """Return the tasks of our compiled flow."""
    flow = copy.deepcopy(our_flow(case))
    flow.compile()
    return of_flow(flow, case)


def our_flow(case: Case) -> nn.Module:
    """Return our flow of a case."""
    from pyro_flows import flows

    sizes = {"bins": BINS, "bound": BOUND} if case.splines else {}
    flow = getattr(flows, case.flow)(case.dim, num_transforms=LAYERS, hidden_dims=HIDDEN, **sizes)
    return flow.to(case.x.device)


def of_flow(flow: nn.Module, case: Case) -> Contender:
    """Return the tasks of a flow of ours."""
    return contender(
        case,
        lambda value: flow().log_prob(value),
        lambda: flow().sample((case.batch,)),
        lambda: flow.rsample_and_log_prob((case.batch,))[1],
        list(flow.parameters()),
    )


def floor(case: Case) -> Contender:
    """Return the tasks of the matrix products: y = x Wᵀ per layer, and in a step the gradients of x and W.

    Masked weights count as dense ones.  Both directions have the same products: the direction of D passes needs those
    of one pass if each unit is computed once.
    """
    weights = [m.weight.detach() for m in our_flow(case).modules() if isinstance(m, nn.Linear)]
    like = {"dtype": case.x.dtype, "device": case.x.device}
    rows = [
        (w, torch.randn(case.batch, w.shape[1], **like), torch.randn(case.batch, w.shape[0], **like)) for w in weights
    ]
    results = [(torch.empty_like(y), torch.empty_like(x), torch.empty_like(w)) for w, x, y in rows]

    def forward() -> None:
        for (w, x, _), (out, _, _) in zip(rows, results, strict=True):
            torch.mm(x, w.T, out=out)

    def step() -> None:
        forward()
        for (w, x, y), (_, of_x, of_w) in zip(rows, results, strict=True):
            torch.mm(y, w, out=of_x)
            torch.mm(y.T, x, out=of_w)

    return {"log-prob": forward, "step": step, "sample": forward, "slow step": step}
