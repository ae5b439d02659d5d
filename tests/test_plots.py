"""Plots show the given values, and cut off no text."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from models import normals, sampling

import pyro_flows as pf
from pyro_flows import Flow, arviz_versions, flows, plots
from pyro_flows.bijectors import Affine
from pyro_flows.diagnostics.drift import Drift
from pyro_flows.diagnostics.importance import weigh
from pyro_flows.transforms import Elementwise

RANDOM = np.random.default_rng(0)


def read_by_a_person(picture) -> None:
    """Assert that everything drawn lies within the figure, and that titles do not overlap."""
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    renderer = canvas.get_renderer()
    drawn, (width, height) = picture.get_tightbbox(renderer), picture.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.02, (drawn, width, height)
    titles = [axis.title.get_window_extent(renderer) for axis in picture.axes if axis.get_title()]
    for i, box in enumerate(titles):
        assert not any(box.overlaps(other) for other in titles[i + 1 :])


def fit_of(losses, held_out=None, **own):
    own = {"best_step": 5, "best_loss": 1.0, "steps": len(losses), "skipped": 0, "seconds": 1.0, **own}
    return SimpleNamespace(losses=torch.tensor(losses), held_out=held_out, stopped="steps", **own)


def checked(names, error=0.0, reason="No error."):
    """Return a check that has found an error of the first mean."""
    errors, small = torch.zeros(len(names)), torch.full((len(names),), 0.02)
    errors[0] = error
    drift = Drift(errors, small, torch.ones(len(names)), small)
    found = weigh(0.1 * torch.randn(200))
    own = {"psis": found, "khat": found.khat, "log_evidence": found.log_evidence, "chains": drift, "weighted": drift}
    return SimpleNamespace(names=names, verdict="do not trust", reason=reason, **own)


def over(base):
    """Return a flow that doubles the draws of a base."""
    double = Elementwise(Affine(), 2)
    torch.nn.init.constant_(double.params, 3.0)
    return Flow([double], base.to_event(1))


def test_notebooks_show_pictures_by_themselves():
    picture = plots.images(torch.rand(3, 1, 4, 4))
    assert imread(io.BytesIO(picture._repr_png_())).shape[2] == 4
    assert "matplotlib.pyplot" not in {type(picture).__module__, type(picture.canvas).__module__}


def test_history_shows_losses_their_mean_held_out_ones_and_the_state_that_was_kept():
    losses = [1e9] + [3.0 - 0.01 * i for i in range(199)] + [math.nan]
    picture = plots.history(fit_of(losses, torch.tensor([2.0, 1.5]), best_step=150, best_loss=1.5, skipped=1))
    (axis,) = picture.axes
    raw, mean, held_out, kept = axis.get_lines()
    np.testing.assert_allclose(raw.get_ydata(), losses, rtol=1e-6)
    assert len(mean.get_ydata()) == 200 - 40 + 1  # a fifth of the finite losses
    assert mean.get_ydata()[-1] == pytest.approx(np.mean(losses[160:200]))
    assert held_out.get_xdata().tolist() == [100.5, 201.0]
    assert (kept.get_xdata(), kept.get_ydata()) == ([150], [1.5])
    assert axis.get_ylim()[1] < 4  # the first loss does not flatten the others
    assert "1 skipped" in axis.get_title()
    read_by_a_person(picture)


def test_history_of_one_step_and_of_none():
    read_by_a_person(plots.history(fit_of([2.0], best_step=1, best_loss=2.0)))
    early = plots.history(fit_of([2.0], best_step=0, best_loss=math.nan))  # interrupted before a state was scored
    assert not [line for line in early.axes[0].get_lines() if "kept" in line.get_label()]
    with pytest.raises(ValueError, match="no step of this fit has a finite loss"):
        plots.history(fit_of([math.nan]))


def test_records_plot_themselves():
    fit = pf.fit_density(flows.nsf(2, num_transforms=2), torch.randn(60, 2), max_epochs=1, progress=False)
    assert fit.plot().axes[0].get_ylabel() == "loss"


def test_marginals_are_densities_of_the_numbers_of_all_sites():
    draws = {"mu": torch.randn(4000), "tau": torch.randn(4000).exp(), "theta": torch.randn(4000, 2, 2)}
    reference = {"mu": np.asarray(3 + 0.5 * RANDOM.standard_normal(5000)), "other": torch.randn(5000)}
    picture = plots.marginals(draws, reference, labels=("flow", "NUTS"))
    names = ["mu", "tau", "theta[0, 0]", "theta[0, 1]", "theta[1, 0]", "theta[1, 1]"]
    assert [axis.get_title() for axis in picture.axes] == names
    grid, density = picture.axes[0].get_lines()[0].get_data()
    np.testing.assert_allclose(density.max(), 1 / (0.5 * math.sqrt(2 * math.pi)), rtol=0.1)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.02)
    assert abs(grid[density.argmax()] - 3) < 0.3
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == ["flow", "NUTS"]
    read_by_a_person(picture)


def test_marginals_are_of_the_draws_that_are_finite():
    """One draw that is not finite would leave an empty plot."""
    values = torch.randn(1000)
    bad = torch.cat((values, torch.tensor([math.nan, math.inf, -math.inf])))
    picture = plots.marginals({"a": bad, "same": torch.ones(1003)}, {"a": bad, "same": torch.full((1003,), math.nan)})
    grid, density = picture.axes[0].get_lines()[0].get_data()
    expected = plots.marginals({"a": values}, {"a": values}).axes[0].get_lines()[0]
    np.testing.assert_allclose((grid, density), expected.get_data())
    assert 1.0 in [line.get_xdata()[0] for line in picture.axes[1].get_lines()]  # a point instead of a density
    (axis,) = plots.marginals({"a": torch.tensor([1.0, *[2.0] * 999])}).axes
    assert [line.get_xdata()[0] for line in axis.get_lines()] == [2.0]
    read_by_a_person(picture)


def test_draws_come_in_any_dtype_and_sites_without_numbers_are_left_out():
    draws = {"half": torch.randn(50).bfloat16(), "none": torch.randn(50, 0), "bool": torch.randn(50) > 0}
    assert [axis.get_title() for axis in plots.marginals(draws).axes] == ["half", "bool"]
    assert len(plots.pairs(draws).axes) == 4


def test_marginals_of_many_quantities_show_the_first_and_say_so():
    picture = plots.marginals(torch.randn(50, 30))
    assert (len(picture.axes), picture.get_supxlabel()) == (12, "the first 12 of 30 quantities")
    read_by_a_person(picture)
    read_by_a_person(plots.marginals({"a site of a name that is far too long for a panel": torch.randn(50)}))
    read_by_a_person(plots.marginals({"constant": torch.ones(50), "heavy": torch.randn(50).div(torch.randn(50) ** 3)}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.marginals(torch.randn(5)), r"draws must be a dict of sites.*shape \(N, D\), got \(5,\)"),
        (lambda: plots.marginals({"a": torch.randn(5), "b": torch.randn(6)}), "as many of each site"),
        (lambda: plots.marginals({}), "must hold two draws or more"),
        (lambda: plots.marginals({"a": torch.randn(5)}, {"b": torch.randn(5)}), "the reference holds"),
        (lambda: plots.pairs({"a": torch.randn(5)}, {"b": torch.randn(5)}), "the reference holds"),
        (lambda: plots.marginals({"a": torch.randn(5, 0)}), "must hold two draws or more"),
        (lambda: plots.pairs({"a": torch.full((5,), math.nan)}), r"must be finite, and in none are all of \['a'\]"),
        (lambda: plots.images(torch.rand(3, 1, 8, 8), columns=0), "columns must be an integer of at least 1, got 0"),
        (lambda: plots.pairs(torch.randn(5, 2), names=["a"]), "names must be 2 different ones, got"),
        (lambda: plots.pairs(torch.randn(5, 2), names=["a", "a"]), "names must be 2 different ones, got"),
        (lambda: plots.images(torch.rand(3, 8, 8)), r"images must have shape \(N, 1 or 3, H, W\), got \(3, 8, 8\)"),
        (lambda: plots.deformation(flows.nsf(3)), r"over two features, got \(3,\)"),
        (lambda: plots.deformation(flows.nsf(2), most=1), "deformation: most must be an integer of at least 2, got 1"),
        (lambda: plots.deformation(over(dist.Normal(torch.zeros(3, 2), 1))), r"one base is pictured, .* of \(3,\)"),
        (lambda: plots.deformation(over(dist.Normal(torch.full((2,), 3e38), 1e36))), "Elementwise, makes draws that"),
        (lambda: plots.deformation(flows.nsf(2, 1)), "context"),
        (lambda: plots.deformation(flows.nsf(2, 1), torch.zeros(3, 1)), r"a batch of \(3,\)"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_picture_shows_data_below_and_samples_above_on_the_same_axes():
    data = RANDOM.standard_normal((500, 3)) * (1.0, 10.0, 100.0)
    data[0] = 1e6  # an outlier does not flatten the others
    samples = RANDOM.standard_normal((400, 3)) + 1
    samples[1] = np.inf
    figure = plots.pairs(data, samples, names=["a", "b", "a name that is far too long"])
    axes = np.array(figure.axes).reshape(3, 3)
    for row, column in ((0, 1), (0, 2), (1, 2)):
        above, below = axes[row, column], axes[column, row]
        assert (above.get_xlim(), above.get_ylim()) == (below.get_ylim(), below.get_xlim())
        np.testing.assert_array_equal(below.collections[0].get_offsets(), data[:399, [row, column]])
        np.testing.assert_array_equal(above.collections[0].get_offsets(), np.delete(samples, 1, 0)[:, [column, row]])
        assert below.get_xlim() == axes[row, row].get_xlim()
    low, high = axes[1, 1].get_xlim()
    assert -60 < low < -20 < 20 < high < 60
    labels = [axis.get_xlabel() for axis in axes[2]], [axis.get_ylabel() for axis in axes[:, 0]]
    assert labels == 2 * (["a", "b", "a name tha… too long"],)


def test_the_picture_of_many_columns_shows_the_first_and_says_so():
    data = RANDOM.standard_normal((50, 8))
    figure = plots.pairs(data, data, names="abcdefgh")
    assert len(figure.axes) == 36
    assert "(the first 6 of 8 columns)" in figure.get_suptitle()
    assert "columns" not in plots.pairs(data[:, :2], data[:, :2]).get_suptitle()


def test_the_picture_takes_any_names(tmp_path):
    """Dollars do not begin a formula, which could fail to render."""
    data = RANDOM.standard_normal((20, 2))
    figure = plots.pairs(data, data, names=["price ($", r"\frac{$}{$}_x^"])
    figure.savefig(tmp_path / "pairs.png")
    assert figure.axes[2].get_xlabel() == r"price (\$"


def test_the_picture_has_a_width_that_outliers_do_not_set():
    low, high = plots.pairs(np.eye(500, 1) * 3).axes[0].get_xlim()  # a column that hardly varies
    assert low < 0 < 3 < high
    heavy = np.concatenate((np.linspace(-1, 1, 900), np.full(100, 1e6)))[:, None]
    assert plots.pairs(heavy).axes[0].get_xlim()[1] < 10


def test_pairs_of_sites_take_those_of_the_same_names():
    guide = {"mu": torch.randn(100), "theta": torch.randn(100, 2)}
    picture = plots.pairs(guide, {"theta": torch.randn(80, 2), "mu": torch.randn(80)}, labels=("guide", "NUTS"))
    assert [axis.get_ylabel() for axis in picture.axes[::3]] == ["mu", "theta[0]", "theta[1]"]
    read_by_a_person(picture)
    picture = plots.pairs({"mu": torch.randn(50)}, {"mu": torch.randn(50, 1)})  # the shape of scalars in Predictive
    assert picture.axes[0].get_xlabel() == "mu"
    read_by_a_person(plots.pairs({"mu": guide["mu"], "tau": guide["mu"]}))  # nothing stands above the diagonal
    read_by_a_person(plots.pairs({"a": torch.randn(50)}, {"a": torch.randn(50)}))


@pytest.mark.parametrize("scale", [0.5, 0.95])
def test_weights_show_what_the_heaviest_draws_hold(scale):
    model = sampling(x=normals(3))
    found = pf.psis(model, pf.AutoFlow(model, init_scale=scale), num_samples=500)
    picture = found.plot()
    raw, smoothed, even = picture.axes[1].get_lines()
    weights = found.log_weights.exp().sort(descending=True).values
    np.testing.assert_allclose(raw.get_ydata(), weights.cumsum(0) / weights.sum(), rtol=1e-4)
    assert raw.get_ydata()[-1] == smoothed.get_ydata()[-1] == pytest.approx(1)
    np.testing.assert_array_equal(even.get_xdata(), even.get_ydata())
    bars = picture.axes[0].patches
    places = np.array([bar.get_x() + bar.get_width() / 2 for bar in bars]), [bar.get_height() for bar in bars]
    middle = float((found.log_weights - found.log_evidence).clip(-8, 8).mean())
    assert np.average(places[0], weights=places[1]) == pytest.approx(middle, abs=0.1)
    assert ("not reliable" in picture.get_suptitle()) == (scale == 0.5)
    read_by_a_person(picture)


def test_a_check_shows_errors_on_either_side_as_large_as_they_are():
    low, high = (plots.check(checked(["a", "b"], error)).axes[0] for error in (-2.5, 2.5))
    assert low.get_lines()[0].get_xdata()[0] == -high.get_lines()[0].get_xdata()[0] == -2.5
    assert low.get_xlim()[0] < -2.5 < 2.5 < high.get_xlim()[1]


def test_a_check_shows_ratios_of_sds_with_two_standard_errors():
    found = checked(["a", "b"])
    drift = found.chains._replace(variance=torch.tensor([0.25, 1.0]), variance_se=torch.tensor([0.01, 0.04]))
    found.chains = found.weighted = drift
    chains = plots.check(found).axes[1].containers[0]
    np.testing.assert_allclose(chains.lines[0].get_xdata(), [2.0, 1.0])
    ends = np.array(chains.lines[2][0].get_segments())[:, :, 0]
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 4 * drift.ratio_se, rtol=1e-5)


def test_a_calibration_shows_shares_beside_the_band_of_exact_guides():
    u = torch.tensor([0.1, 0.2, 0.2, 0.7])
    found = pf.diagnostics.Calibration(["a"], u[:, None], u, 1 - u, torch.tensor([0.5]), 0.5, 0.5, 0.5)
    ranks, coverage, tarp = plots.calibration(found).axes
    np.testing.assert_allclose(ranks.get_lines()[0].get_ydata()[[10, 50, 180]], [-0.05, 0.5, 0.1], atol=1e-9)
    np.testing.assert_allclose(coverage.get_lines()[1].get_ydata()[[10, 50, 180]], [0, 0.75, 1])
    np.testing.assert_allclose(tarp.get_lines()[1].get_ydata()[[10, 70, 182]], [0, 0.25, 1])
    band = coverage.collections[0].get_paths()[0].vertices
    for end in band[:, 1] - band[:, 0]:
        assert abs(end) == pytest.approx(1.358 / 4**0.5)  # Kolmogorov and Smirnov's test of four quantities, at 5 %


def test_a_check_of_many_quantities_shows_the_worst_and_says_so():
    picture = plots.check(checked([f"q{i}" for i in range(40)], error=1.0))
    labels = [label.get_text() for label in picture.axes[0].get_yticklabels()]
    assert (len(labels), labels[0]) == (30, "q0")
    assert picture.get_supxlabel() == "the 30 of 40 quantities with the largest errors"
    read_by_a_person(picture)


@pytest.mark.slow
def test_reports_take_any_names():
    """Dollars do not begin a formula, which could fail to render."""
    name = r"\frac{$a$}_$\frac$"
    read_by_a_person(plots.check(checked([name, "long " * 20], reason=f"mean of {name} off.")))
    u = torch.rand(50)
    found = pf.diagnostics.Calibration([name], u[:, None], u, u, torch.tensor([1e-9]), 1e-9, 0.5, 0.5)
    assert name in found.reason
    read_by_a_person(plots.calibration(found))


def test_images_stand_row_by_row():
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    shown = plots.images(images, columns=3, levels=5).axes[0].images[0].get_array()
    assert shown.shape == (6, 9, 3)
    np.testing.assert_allclose(shown[::3, ::3, 0], [[0, 0.25, 0.5], [0.75, 1, 1]])


def test_one_image_that_is_not_finite_leaves_the_others():
    images = torch.cat((torch.rand(2, 1, 4, 4), torch.full((1, 1, 4, 4), math.nan)))
    shown, others = (plots.images(x).axes[0].images[0].get_array() for x in (images, images[:2]))
    assert not np.ma.getmaskarray(shown).any()
    np.testing.assert_array_equal(shown[:, :10], others)
    assert (shown[:, 10:] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [flows.nsf, flows.maf, flows.cnf])
def test_deformation_follows_the_transforms(recipe):
    flow = recipe(2, 1)
    context = torch.tensor([0.3])
    pyro.set_rng_seed(1)
    picture = plots.deformation(flow, context)
    pyro.set_rng_seed(1)
    expected = flow(context).sample((1000,))
    shown = np.asarray(picture.axes[-1].collections[-1].get_offsets())
    np.testing.assert_allclose(shown, expected.numpy(), atol=1e-4)
    corner = picture.axes[0].collections[0].get_segments()[0][0]
    assert abs(corner).min() > 2  # the value of the base, at about 2.5 standard deviations
    read_by_a_person(picture)


def test_deformation_of_a_deep_flow_shows_some_layers_and_the_last():
    titles = [axis.get_title() for axis in plots.deformation(flows.maf(2, num_transforms=12), most=4).axes]
    assert titles == ["base", *(f"{n} inverse Autoregressive" for n in (4, 8, 12))]


def test_the_density_estimate_is_right_at_a_hard_end():
    grid, density = arviz_versions.kde(RANDOM.exponential(size=20_000))
    assert density[np.searchsorted(grid, 0.02)] == pytest.approx(1, abs=0.15)
