"""Columns without a density: integers, rounded values, and repeated values and rows are reported by column.

Dequantised integers have a density, whose mean bounds their log-mass.
"""

import math

import laws
import numpy as np
import pandas as pd
import pytest
import torch
from laws import normal
from scipy import stats
from torch import Tensor

from pyro_flows import Spike, dequantize, find_spikes
from pyro_flows.data.columns import as_table, tied_columns
from pyro_flows.flows.distribution import Columns

# ------------------------------------------------------------------------------------------------------------ findings


CONTINUOUS = {
    "normal": lambda x: x,
    "uniform": lambda x: torch.special.ndtr(x),
    "cauchy": lambda x: torch.tan(math.pi * (torch.special.ndtr(x) - 0.5)),
    "log-normal": lambda x: (4 * x).exp(),
    "tiny": lambda x: 1e-30 * x,
    "huge": lambda x: 1e9 * x,  # in float32, all of these values are integers
    "with two scales": lambda x: torch.where(x > 1, 1e5 * x, 1e-3 * x),
}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [20, 20_000])
def test_continuous_columns_are_let_be(name: str, dtype: torch.dtype, rows: int) -> None:
    assert find_spikes(CONTINUOUS[name](normal(rows, 4)).to(dtype)) == []


def only(x: Tensor) -> Spike:
    (found,) = find_spikes(x)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int16])
@pytest.mark.parametrize("rows", [20, 20_000])
def test_integers_are_found(dtype: torch.dtype, rows: int) -> None:
    x = (3 * normal(rows)).round().to(dtype)
    counts = torch.bincount((x - x.min()).long())
    value, share = float(counts.argmax() + x.min()), counts.max().item() / rows
    assert only(x) == Spike(0, "integers", share, value, 1.0)


def test_flags_counts_and_ids_are_integers() -> None:
    x = torch.stack((normal(1000) > 0, torch.arange(1000), torch.full((1000,), 7)), 1)
    assert [(spike.column, spike.kind) for spike in find_spikes(x)] == [(0, "integers"), (1, "integers"), (2, "value")]
    assert find_spikes((1e6 * normal(1000)).round()) == []  # at the limit of the resolution


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("step", "loc"), [(0.01, 0.0), (0.01, 37.0), (0.25, -3.1), (12.5, 1e4), (1e-7, 0.0), (2.0, 0.5)]
)
def test_rounded_values_are_a_lattice(dtype: torch.dtype, step: float, loc: float) -> None:
    x = (loc + step * (30 * normal(5000)).round()).to(dtype)
    found = only(x)
    assert (found.column, found.kind) == (0, "lattice")
    assert found.step == pytest.approx(step, rel=1e-3)
    assert found.share == ((x - found.value).abs() < step / 2).double().mean().item()
    mixed = torch.where(torch.arange(5000) % 3 == 0, x, (loc + 30 * step * normal(5000, seed=1)).to(dtype))
    assert [spike.kind for spike in find_spikes(mixed)] in ([], ["value"])


def test_errors_of_rounding_do_not_hide_a_lattice() -> None:
    tenths = (5 * normal(2000)).round()
    x = torch.where(torch.arange(2000) % 2 == 0, tenths / 10, tenths * 0.1)
    assert len(x.unique()) > len((x * 10).round().unique())
    found = only(x)
    assert (found.kind, found.share) == ("lattice", torch.bincount((tenths - tenths.min()).long()).max().item() / 2000)


def test_single_values_among_others_are_found() -> None:
    x = normal(2000, 3)
    x[:400, 1] = 0.0
    x[:30, 2] = -1.5
    assert find_spikes(x) == [Spike(1, "value", 0.2, 0.0), Spike(2, "value", 0.015, -1.5)]
    assert find_spikes(x, share=0.02) == [Spike(1, "value", 0.2, 0.0)]
    x[:30, 2] = normal(30, seed=3)
    x[:400, 1] = torch.where(torch.arange(400) % 2 == 0, 0.0, -0.0).double()
    assert find_spikes(x) == [Spike(1, "value", 0.2, 0.0)]


def test_few_rows_that_share_a_value_by_chance_are_let_be() -> None:
    x = normal(50, 2)
    x[:4] = x[4:8]  # 8 % of the rows, but only four rows
    assert find_spikes(x) == []
    x[:5] = x[5]
    assert [spike.kind for spike in find_spikes(x)] == ["value", "value"]


def test_copies_are_no_fault_of_their_own_where_all_columns_repeat_values() -> None:
    """Rows of counts coincide; leaving some of them out would change the distribution."""
    counts = torch.randint(0, 5, (1000, 2)).double()
    assert [spike.kind for spike in find_spikes(counts)] == ["integers", "integers"]
    x = torch.cat((counts, normal(1000, 1)), -1)
    assert [spike.kind for spike in find_spikes(x)] == ["integers", "integers"]
    x[:100] = x[100:200]
    assert [spike.kind for spike in find_spikes(x)] == ["integers", "integers", "rows"]


def test_columns_that_determine_one_another_are_found() -> None:
    x = normal(1000, 4)
    assert tied_columns(x) == []
    x[:, 3] = 2 * x[:, 0] - x[:, 2] + 7
    assert tied_columns(x) == [0, 2, 3]
    assert tied_columns(x.float()) == [0, 2, 3]
    x[:, 3] += 1e-4 * normal(1000, seed=5)
    assert tied_columns(x) == []


def test_copies_of_rows_are_found() -> None:
    x = normal(1000, 3)
    x[:100] = x[100:200]
    assert find_spikes(x) == [Spike(None, "rows", 0.1)]
    x[:100, 2] = normal(100, seed=5)
    assert find_spikes(x) == []
    x[:100, [0, 1, 2]] = x[100:200, [1, 2, 0]]  # the same values in another order
    assert find_spikes(x) == []


# ------------------------------------------------------------------------------------------------------------ the noise


def test_noise_is_uniform_within_each_cell() -> None:
    k = (3 * normal(4000, seed=1)).round()
    noisy = dequantize(k, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noisy.floor(), k)
    assert stats.kstest((noisy - k).numpy(), "uniform").pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack((k, noisy - k)))[0, 1]) < 0.06
    assert torch.equal(noisy, dequantize(k, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(noisy, dequantize(k, generator=torch.Generator().manual_seed(1)))
    assert find_spikes(noisy) == []


def test_only_columns_of_integers_are_changed() -> None:
    x = torch.stack((normal(50), (9 * normal(50)).round(), normal(50) > 0, (9 * normal(50)).round() / 2), 1)
    before = x.clone()
    noisy = dequantize(x)
    assert torch.equal(x, before)
    assert (noisy != x).any(0).tolist() == [False, True, True, False]
    assert (dequantize(x, [2]) != x).any(0).tolist() == [False, False, True, False]
    assert (dequantize(x, [3], step=0.5) != x).any(0).tolist() == [False, False, False, True]
    assert (dequantize(x, step=0.5) != x).any(0).tolist() == [False, True, True, True]
    assert torch.equal((2 * dequantize(x, [3], step=0.5)).floor()[:, 3], 2 * x[:, 3])
    assert torch.equal(dequantize(x[:, :1]), x[:, :1])


def test_a_grid_may_have_an_offset() -> None:
    x = normal(50).round() + 0.5
    assert torch.equal(dequantize(x, [0]).sub(0.5).floor(), x - 0.5)
    assert torch.equal(dequantize(x), x)  # the values are not integers


@pytest.mark.parametrize("kind", ["tensor", "array", "frame"])
def test_any_table_can_be_spread(kind: str) -> None:
    x = torch.tensor([[1, 10], [2, 20], [3, 30]])
    given = {"tensor": x, "array": x.numpy(), "frame": pd.DataFrame(x.numpy(), columns=["a", "b"])}[kind]
    noisy = dequantize(given, ["b"] if kind == "frame" else [1])
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy[:, 0], x[:, 0].float())
    assert torch.equal(noisy.floor(), x.float())
    assert (noisy[:, 1] != x[:, 1]).any()
    assert dequantize(x.double()).dtype == torch.float64


def test_the_mean_log_density_bounds_the_log_mass() -> None:
    """The bound is strict if the density varies within cells, and equals the mass otherwise."""
    k = torch.distributions.Poisson(3.0).sample((20_000,)).double()
    noisy = dequantize(k, generator=torch.Generator().manual_seed(0))
    density = torch.distributions.Normal(torch.tensor(3.5).double(), math.sqrt(3 + 1 / 12))
    assert density.log_prob(noisy).mean() < (density.cdf(k + 1) - density.cdf(k)).log().mean()
    counts = torch.bincount(k.long()) / len(k)
    assert torch.equal(counts[noisy.floor().long()], counts[k.long()])


# --------------------------------------------------------------------------------------------------------------- errors


TABLE = normal(10, 2)
test_wrong_arguments_are_refused = laws.refusals(
    *(
        (lambda step=step: dequantize(TABLE, step=step), "step must be positive")
        for step in (0.0, -1.0, math.inf, math.nan)
    ),
    (lambda: dequantize(TABLE, [1]), "dequantize: column 1 holds values that are no multiples of 1"),
    (lambda: dequantize(TABLE, [2]), "dequantize: columns must hold places from 0 to 1, got 2"),
    *((lambda wrong=wrong: dequantize(TABLE, [wrong]), "places from 0 to 1, got") for wrong in (-1, True, 0.0, "a")),
    (lambda: dequantize(pd.DataFrame({"a": [1], "b": [2]}), ["c"]), "columns must hold the names 'a', 'b' or places"),
    (lambda: find_spikes(TABLE, share=1.0), "find_spikes: share must lie between 0 and 1, got 1.0"),
    (lambda: find_spikes(torch.zeros(2, 2, 2)), r"x must have shape \(N, D\) or \(N,\), got \(2, 2, 2\)"),
    (lambda: find_spikes(torch.zeros(0, 3)), r"find_spikes: x must have shape .*got \(0, 3\)"),
    (lambda: find_spikes(torch.tensor([[0.0, math.nan]] * 2)), r"find_spikes: x holds NaN or inf \(2 of 4 numbers\)"),
    (lambda: find_spikes(np.ma.array([[1, 2]], mask=[[False, True]])), r"NaN or inf \(1 of 2 numbers\)"),  # missing
)


NO_NUMBERS = [
    (torch.zeros(3, 2, dtype=torch.complex64), "hold real numbers, got torch.complex64"),
    (torch.zeros(3, 2, dtype=torch.float16), "hold real numbers of float32, .*got torch.float16"),
    (torch.zeros(3, 2, dtype=torch.bfloat16), "got torch.bfloat16"),
    (np.zeros((3, 2), dtype=np.float16), "got torch.float16"),
    (np.zeros((3, 2), dtype=np.complex128), "got torch.complex128"),
    (np.array([["1", "2"]]), r"column 0 holds .*'1'.* \(str_?\)"),
    (np.array([[1.0, None]], dtype=object), r"column 1 holds None \(NoneType\)"),
    (np.zeros(3, dtype=[("a", float), ("b", float)]), "column 0 holds .*void"),
    (pd.DataFrame({"a": [1.0, 2.0], "town": ["Rome", "Bonn"]}), r"column 'town' holds 'Rome' \(str\)"),
    (pd.DataFrame({"a": [1.0], "day": pd.to_datetime(["2020-01-01"])}), "column 'day' holds Timestamp.*Leave it"),
]
test_what_holds_no_real_numbers_is_refused_by_column = laws.refusals(
    *((lambda value=value: find_spikes(value), f"^find_spikes: x must .*{words}") for value, words in NO_NUMBERS)
)


@pytest.mark.parametrize(
    "value",
    [
        *(np.array([[1, 2], [3, 4]], dtype=kind) for kind in ("u2", "u8", ">i4", ">f8", np.longdouble, object)),
        np.array([[1, 2], [3, 4]], dtype=np.int8)[:, ::-1][:, ::-1],
        np.ma.array([[1, 2], [3, 4]]),
        pd.DataFrame({"a": [1, 3], "b": [2.0, 4.0]}),
        pd.DataFrame({"a": pd.array([1, 3], dtype="Int64"), "b": [2.0, 4.0]}),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True),
    ],
)
def test_numbers_of_every_kind_are_read(value: object) -> None:
    found, _ = as_table("test", "x", value)
    assert found.double().tolist() == [[1, 2], [3, 4]]
    assert not found.requires_grad
    found += 1  # a copy or the tensor, never a read-only array


@pytest.mark.parametrize("number", [10, 9, 1])
def test_some_rows_of_integers_are_warned_of_too(number):
    """One raw row among ten is no chance: noise is hardly ever exactly zero."""
    columns, rows = Columns(("k",), ((0, 0.0, 2.0),)), torch.full((10, 1), 1.5)
    columns.warn_of_integers(rows)
    rows[:number] = 1.0
    with pytest.warns(UserWarning, match="integers with noise in columns 'k'"):
        columns.warn_of_integers(rows)
