"""Every error of the public functions, on every backend: its type, and the argument it names."""

import functools

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import vae_fast


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


KEY = torch.zeros(2, dtype=torch.uint64)

REPARAMETERIZE = [
    (dict(mu=[1.0]), TypeError, "mu must be a torch.Tensor, got list"),
    (dict(scale=1.0), TypeError, "scale must be a torch.Tensor, got float"),
    (dict(mu=t(4, 3, dtype=torch.int64)), TypeError, "mu must be float16.*got int64"),
    (dict(scale=t(4, 3, dtype=torch.complex64)), TypeError, "scale must be float16.*complex64"),
    (dict(scale=t(4, 3, dtype=torch.float64)), TypeError, "scale is float64.*does not mix"),
    (dict(mu=t()), ValueError, "mu must have a batch dimension"),
    (dict(scale=t(4, 2)), ValueError, r"scale of shape \(4, 2\) does not broadcast to \(4, 3\)"),
    (dict(scale=t(5, 4, 3)), ValueError, "scale of shape"),
    (dict(param="sigma"), ValueError, "param must be one of logvar, .*got 'sigma'"),
    (dict(param=0), ValueError, "param must be one of"),
    (dict(num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
    (dict(num_samples=2.0), TypeError, "num_samples must be an int, got float"),
    (dict(clamp=(1.0, -1.0)), ValueError, "clamp must have lo <= hi"),
    (dict(clamp=(float("nan"), 1.0)), ValueError, "clamp must have lo <= hi"),
    (dict(clamp=3.0), ValueError, "clamp must be a pair"),
    (dict(key=t(2)), ValueError, "key must be a uint64 tensor"),
    (dict(key=KEY[:1]), ValueError, r"key must be .*shape \(2,\)"),
    (dict(key=(0, 0)), TypeError, "key must be a torch.Tensor"),
    (dict(key=KEY.to("meta")), ValueError, "key is on meta, but mu is on"),
    (dict(scale=t(4, 3).to("meta")), ValueError, "scale is on meta"),
]

NLL = [
    (dict(x=None), TypeError, "x must be a torch.Tensor, got NoneType"),
    (dict(mean=1), TypeError, "mean must be a torch.Tensor, got int"),
    (dict(scale="1"), TypeError, "scale must be a torch.Tensor or a number, got str"),
    (dict(scale=True), TypeError, "scale must be a torch.Tensor or a number, got bool"),
    (dict(x=t(4, 6, dtype=torch.int64)), TypeError, "x must be float16.* or uint8; got int64"),
    (
        dict(x=t(4, 6).bool()),
        TypeError,
        r"x must .* got bool: x\.float\(\) has its values",
    ),
    (dict(clamp_mode="firm"), ValueError, "clamp_mode must be one of hard, soft; got 'firm'"),
    (dict(clamp=(-1, 1e999), clamp_mode="soft"), ValueError, "clamp must be finite with lo < hi"),
    (dict(x_scale=(0, 1)), ValueError, r"x_scale must be finite with a > 0, got \(0.0, 1.0\)"),
    (dict(x_scale=2.0), ValueError, "x_scale must be a pair of numbers"),
    (dict(dequantize=True), TypeError, "dequantize=True needs x of dtype uint8, got torch.float32"),
    (dict(dequantize=0), TypeError, "dequantize must be a bool, got int"),
    (dict(df=0.0), ValueError, "df must be a positive number, from 1e-10 to 1e30, got 0.0"),
    (dict(df=1e31), ValueError, r"df must be .* from 1e-10 to 1e30, got 1e\+31"),
    (dict(scale=t(5, 1)), ValueError, r"scale of shape \(5, 1\) does not broadcast to \(4, 6\)"),
    (dict(mean=t(4, 6, dtype=torch.float64)), TypeError, "mean is float64.*does not mix"),
    (dict(x=t(), mean=t()), ValueError, "x must have a batch dimension"),
    (dict(mean=t(4, 5)), ValueError, r"mean of shape \(4, 5\) does not fit x of shape \(4, 6\)"),
    (dict(mean=t(3, 6)), ValueError, r"mean of shape \(3, 6\) does not fit"),
    (dict(mean=t(2, 3, 6)), ValueError, r"mean of shape \(2, 3, 6\) does not fit"),
    (dict(mean=t(0, 4, 6), scale=0.0), ValueError, "mean must hold at least one sample"),
    (dict(scale=t(4, 5)), ValueError, "scale of shape"),
    (dict(scale=None), ValueError, "mean of shape .* packed mean and scale"),
    (dict(param="precision"), ValueError, "param must be one of"),
    (dict(clamp=(2, 1)), ValueError, "clamp must have lo <= hi"),
    (dict(mask=[True]), TypeError, "mask must be a torch.Tensor"),
    (dict(mask=t(4, 6)), TypeError, "mask must be bool, got float32"),
    (dict(mask=t(4, 5).bool()), ValueError, "mask of shape"),
    (dict(mean=t(4, 6).to("meta")), ValueError, "mean is on meta"),
    (dict(mask=t(4, 6).bool().to("meta")), ValueError, "mask is on meta"),
]

LIKELIHOOD = [
    (
        dict(mean=t(4, 5), scale=None, likelihood="bernoulli"),
        ValueError,
        r"mean of shape \(4, 5\) does not fit x of shape \(4, 6\)",
    ),
    (dict(likelihood="cauchy"), ValueError, "likelihood must be one of gaussian, .*'cauchy'"),
    (dict(likelihood="bernoulli"), ValueError, "scale must be None, for likelihood='bernoulli'"),
    (
        dict(x=t(4, 6, dtype=torch.uint8), likelihood="logistic", dequantize=True),
        ValueError,
        "dequantize=True needs a density, but likelihood='logistic'",
    ),
    (
        dict(x=t(4, 6, dtype=torch.uint8), dequantize=True, key=t(2)),
        ValueError,
        "key must be a uint64",
    ),
    (
        dict(x=t(4, 6, dtype=torch.uint8), dequantize=True, key=KEY.to("meta")),
        ValueError,
        "key is on meta",
    ),
]

KL = [
    (dict(mu=1.0), TypeError, "mu must be a torch.Tensor, got float"),
    (dict(mu=t()), ValueError, "mu must have a batch dimension"),
    (dict(scale=t(4, 2)), ValueError, "scale of shape .* does not broadcast"),
    (dict(prior=t(4, 3)), TypeError, r"prior must be a pair of tensors \(mu, scale\), got Tensor"),
    (dict(prior=(t(4, 3), None)), TypeError, "prior's scale must be a torch.Tensor, got NoneType"),
    (dict(prior=(t(4, 5), t(3))), ValueError, "prior's mu of shape .* does not broadcast"),
    (dict(prior=(t(3), t(2))), ValueError, "prior's scale of shape .* does not broadcast"),
    (dict(prior=(t(3).double(), t(3))), TypeError, "prior's mu is float64.*does not mix"),
    (dict(param="x"), ValueError, "param must be one of"),
    (dict(prior_param="x"), ValueError, "prior_param must be one of"),
    (dict(clamp=(1, 0)), ValueError, "clamp must have lo <= hi"),
    (dict(clamp_mode="x"), ValueError, "clamp_mode must be one of"),
]

IMPORTANCE = [
    (dict(nll=None), TypeError, "nll must be a torch.Tensor"),
    (dict(nll=t(4)), ValueError, r"nll must have shape \(K, B\) with K ≥ 1, got \(4,\)"),
    (dict(nll=t(0, 4)), ValueError, "nll must have shape"),
    (dict(nll=t(2, 4).half(), log_q=t(2, 4).half(), log_p=None), TypeError, "nll must be float32"),
    (dict(log_q=t(2, 3)), ValueError, "log_q must be float32 of nll's shape"),
    (dict(log_p=t(2, 4).half()), ValueError, "log_p must be float32 .* got float16"),
    (dict(beta="1"), TypeError, "beta must be a float, got str"),
]

ELBO = [
    (dict(log_q=3.0), TypeError, "log_q must be a torch.Tensor, got float"),
    (dict(log_q=t(4, dtype=torch.float64)), TypeError, "log_q must be float32, got float64"),
    (dict(log_p=t(5)), ValueError, r"log_p must have shape \(B,\) or \(K, B\)"),
    (dict(log_q=t(1, 4)), ValueError, "log_p must have the shape of log_q"),
    (dict(log_q=t(0, 4), mean=t(0, 6), scale=0.0), ValueError, "log_q must have shape"),
    (dict(log_q=t(2, 4), log_p=t(2, 4)), ValueError, r"expected \(8, 6\), one row for each"),
    (dict(log_q=t(4).to("meta")), ValueError, "log_q is on meta"),
    (dict(reduction="max"), ValueError, "reduction must be one of mean, sum, none; got 'max'"),
    (dict(beta="1"), TypeError, "beta must be a float, got str"),
    (dict(mean=t(4, 5)), ValueError, "mean of shape"),
]

DREG = dict(objective="iwae", estimator="dreg", num_samples=4)

MODULE = [
    (dict(num_samples=0), ValueError, "num_samples must be at least 1"),
    (dict(posterior_param="x"), ValueError, "posterior_param must be one of"),
    (dict(likelihood_param="x"), ValueError, "likelihood_param must be one of"),
    (dict(kl="exact"), ValueError, "kl must be one of"),
    (dict(reduction="avg"), ValueError, "reduction must be one of"),
    (dict(posterior_clamp=(1, 0)), ValueError, "posterior_clamp must have lo <= hi"),
    (dict(likelihood_clamp=(1, 0)), ValueError, "likelihood_clamp must have lo <= hi"),
    (dict(posterior_clamp_mode="x"), ValueError, "posterior_clamp_mode must be one of hard, soft"),
    (dict(likelihood_clamp_mode="x"), ValueError, "likelihood_clamp_mode must be one of"),
    (
        dict(posterior_clamp=(0, 0), posterior_clamp_mode="soft"),
        ValueError,
        "posterior_clamp must be finite with lo < hi",
    ),
    (dict(likelihood="squared_error"), ValueError, "likelihood must be one of"),
    (dict(likelihood_scale="best"), ValueError, "likelihood_scale must be a number, None or one"),
    (dict(likelihood_scale=True), TypeError, "likelihood_scale must be a number, got bool"),
    (dict(likelihood_scale="optimal", likelihood="laplace"), ValueError, "needs .*gaussian"),
    (
        dict(likelihood_scale=0.0, likelihood="bernoulli"),
        ValueError,
        "likelihood_scale must be None",
    ),
    (dict(df=-1.0), ValueError, "df must be a positive number"),
    (dict(objective="vae"), ValueError, "objective must be one of elbo, iwae; got 'vae'"),
    (dict(objective="iwae", kl="analytic"), ValueError, "excludes kl"),
    (dict(objective="iwae", capacity=1.0), ValueError, "excludes free_bits and capacity"),
    (dict(estimator="pathwise"), ValueError, "estimator must be one of standard, stl, dreg"),
    (dict(estimator="dreg"), ValueError, 'estimator="dreg" is for objective="iwae"'),
    (dict(estimator="stl", objective="iwae"), ValueError, 'estimator="stl" is biased'),
    (DREG | dict(likelihood_scale="optimal"), ValueError, 'estimator="dreg" is biased for'),
    (DREG | dict(likelihood_scale="optimal_channel"), ValueError, 'use "optimal_sample"'),
    (dict(estimator="stl", capacity=1.0), ValueError, 'estimator="stl" is biased with capacity'),
    (dict(capacity="1"), TypeError, "capacity must be a number, got str"),
    (dict(capacity=True), TypeError, "capacity must be a number, got bool"),
    (dict(capacity=t(2)), ValueError, "capacity must be a float or a 0-dim tensor"),
    (dict(beta=torch.nn.Parameter(t())), TypeError, "beta must be .* got a Parameter"),
    (dict(beta=None, objective="iwae"), TypeError, "beta must be a float or .* got NoneType"),
    (dict(beta=float("nan")), ValueError, "beta must be finite, got nan"),
    (dict(capacity=torch.nn.Parameter(t())), TypeError, "capacity must be .* got a Parameter"),
    (dict(likelihood_scale=[1.0]), TypeError, "likelihood_scale must be a number, got list"),
    (dict(likelihood_scale=float("nan")), ValueError, "likelihood_scale must be finite, got nan"),
    (
        dict(likelihood_scale=0.0, likelihood_param="std"),
        ValueError,
        "likelihood_scale must be finite and positive",
    ),
    (dict(estimator="stl", kl="analytic"), ValueError, 'estimator="stl" needs kl="monte_carlo"'),
    (dict(prior=3), TypeError, "prior must be a pair of tensors"),
    (dict(prior=(t(3),) * 3), TypeError, r"prior must be a pair of tensors .* got tuple of 3"),
    (
        dict(prior=Normal(t(3), 1.0)),
        TypeError,
        "prior must be .* got Normal: pass its log_prob.* method sample",
    ),
    (dict(prior=(t(3), 1.0)), TypeError, "prior's scale must be a torch.Tensor"),
    (dict(prior=lambda z: z, kl="analytic"), ValueError, "needs a Gaussian prior"),
    (dict(prior_param="x"), ValueError, "prior_param must be one of"),
    (dict(free_bits=0.1), ValueError, 'free_bits needs kl="analytic"'),
    (dict(free_bits=-0.1, kl="analytic"), ValueError, "free_bits must be at least 0"),
    (dict(free_bits="1", kl="analytic"), TypeError, "free_bits must be a number"),
    (dict(free_bits=0.1, capacity=1.0, kl="analytic"), ValueError, "exclude each other"),
    (dict(x_scale=(-1, 0)), ValueError, "x_scale must be finite with a > 0"),
    (dict(dequantize=True, likelihood="bernoulli"), ValueError, "dequantize=True needs a density"),
    *(
        (dict(x_scale=ab, likelihood="bernoulli"), ValueError, r"x_scale must .* within \[0, 1\]")
        for ab in ((2 / 255, -1.0), (0.5, 0.6), (2.0, 0.0))
    ),
]

CALL = [
    (dict(weight=2.0), TypeError, "weight must be a torch.Tensor, got float"),
    (dict(weight=t(3)), ValueError, r"weight must have shape \(4,\), one value per row of x"),
    (dict(weight=t(4).to("meta")), ValueError, "weight is on meta"),
    (dict(mask=t(4, 6)), TypeError, "mask must be bool"),
    (dict(prior=(t(3),)), TypeError, "prior must be a pair of tensors"),
    (dict(prior=lambda z: z), ValueError, r"prior must return log p\(z\) of shape \(4,\)"),
    (dict(prior=(t(2), t(3))), ValueError, "prior's mu of shape .* does not broadcast"),
    (dict(prior=(t(3), t(2))), ValueError, "prior's scale of shape .* does not broadcast"),
    (dict(prior=(t(3), 0.0)), TypeError, "prior's scale must be a torch.Tensor, got float"),
    (dict(prior=(t(3), t(3).double())), TypeError, "prior's scale is float64"),
]


def moved(arguments, device):
    return {
        k: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for k, v in arguments.items()
    }


@pytest.mark.parametrize(("change", "error", "message"), REPARAMETERIZE)
def test_reparameterize(change, error, message, backend):
    arguments = dict(mu=t(4, 3), scale=t(4, 3)) | change
    with pytest.raises(error, match=message):
        vae_fast.reparameterize(**moved(arguments, backend))


@pytest.mark.parametrize(("change", "error", "message"), NLL)
def test_gaussian_nll(change, error, message, backend):
    arguments = dict(x=t(4, 6), mean=t(4, 6), scale=t(4, 6)) | change
    with pytest.raises(error, match=message):
        vae_fast.gaussian_nll(**moved(arguments, backend))


@pytest.mark.parametrize(("change", "error", "message"), LIKELIHOOD)
def test_likelihood_nll(change, error, message, backend):
    arguments = dict(x=t(4, 6), mean=t(4, 6), scale=t(4, 6)) | change
    with pytest.raises(error, match=message):
        vae_fast.likelihood_nll(**moved(arguments, backend))


@pytest.mark.parametrize(("change", "error", "message"), KL)
def test_gaussian_kl(change, error, message, backend):
    arguments = dict(mu=t(4, 3), scale=t(4, 3)) | change
    if isinstance(arguments.get("prior"), tuple):
        arguments["prior"] = tuple(moved(dict(enumerate(arguments["prior"])), backend).values())
    with pytest.raises(error, match=message):
        vae_fast.gaussian_kl(**moved(arguments, backend))


@pytest.mark.parametrize(("change", "error", "message"), IMPORTANCE)
def test_importance_bound(change, error, message, backend):
    arguments = dict(nll=t(2, 4), log_q=t(2, 4), log_p=t(2, 4)) | change
    with pytest.raises(error, match=message):
        vae_fast.importance_bound(**moved(arguments, backend))


def test_optimal_gaussian_nll(backend):
    x = t(4, 6).to(backend)
    with pytest.raises(ValueError, match="over must be one of batch, sample, channel; got 'row'"):
        vae_fast.optimal_gaussian_nll(x, x, over="row")
    with pytest.raises(ValueError, match=r'over="channel" needs x \(B, C, ...\)'):
        vae_fast.optimal_gaussian_nll(x[:, 0], x[:, 0], over="channel")


@pytest.mark.parametrize(("change", "error", "message"), CALL)
def test_module_call(change, error, message, backend):
    mu = t(4, 3).to(backend)
    if isinstance(change.get("prior"), tuple):
        pair = moved(dict(enumerate(change["prior"])), backend)
        change = {"prior": tuple(pair.values())}
    with pytest.raises(error, match=message):
        vae_fast.FusedELBO()(
            t(4, 6).to(backend),
            mu,
            mu,
            lambda z: (z.repeat(1, 2), z.repeat(1, 2)),
            **moved(change, backend),
        )


def test_options_set_later_are_checked_and_undone():
    elbo = vae_fast.FusedELBO(objective="iwae", num_samples=2)
    for name, value in (("kl", "analytic"), ("kl", "analytc"), ("estimator", "stl")):
        before = getattr(elbo, name)
        with pytest.raises(ValueError, match=r"excludes kl|kl must be one of|is biased"):
            setattr(elbo, name, value)
        assert getattr(elbo, name) == before
    with pytest.raises(TypeError, match="beta must be"):
        elbo.beta = torch.nn.Parameter(t())
    assert not list(elbo.parameters())
    elbo.estimator = "dreg"
    assert elbo.estimator == "dreg"


def test_beta_must_be_one_number(backend):
    mu, elbo = t(4, 3).to(backend), vae_fast.FusedELBO(beta=t(2))
    with pytest.raises(ValueError, match=r"beta must be a float or a 0-dim tensor, got \(2,\)"):
        elbo(mu, mu, mu, lambda z: (z, z))


@pytest.mark.parametrize(("change", "error", "message"), ELBO)
def test_fused_elbo(change, error, message, backend):
    arguments = dict(x=t(4, 6), mean=t(4, 6), scale=t(4, 6), log_q=t(4), log_p=t(4)) | change
    with pytest.raises(error, match=message):
        vae_fast.fused_elbo(**moved(arguments, backend))


@pytest.mark.parametrize(("change", "error", "message"), MODULE)
def test_module(change, error, message):
    with pytest.raises(error, match=message):
        vae_fast.FusedELBO(**change)


@pytest.mark.parametrize("output", [None, (1,), "mean"])
def test_decoder_output(output, backend):
    mu = t(4, 3).to(backend)
    with pytest.raises(TypeError, match="decoder must return"):
        vae_fast.FusedELBO()(t(4, 6).to(backend), mu, mu, lambda z: output)


def test_validate_is_a_switch_and_a_context():
    x, broken = t(4, 6), torch.full((4, 6), torch.nan)
    with vae_fast.validate():
        with vae_fast.validate(False):
            vae_fast.gaussian_nll(x, broken, x)
        with pytest.raises(ValueError, match="mean must be finite"):
            vae_fast.gaussian_nll(x, broken, x)
    vae_fast.gaussian_nll(x, broken, x)
    context = vae_fast.validate(True)
    with context, pytest.raises(ValueError, match="mean must be finite"):
        vae_fast.gaussian_nll(x, broken, x)
    vae_fast.gaussian_nll(x, broken, x)


@pytest.mark.parametrize("key", [1234, torch.Generator()])
def test_what_is_no_key_is_told_how_to_make_one(key):
    with pytest.raises(TypeError, match=r"key must be a torch.Tensor, got .*noise\.make_key"):
        vae_fast.reparameterize(t(4, 3), t(4, 3), key=key)


def test_what_is_no_generator_is_named():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int"):
        vae_fast.reparameterize(t(4, 3), t(4, 3), generator=3)


def test_of_two_tensors_the_other_one_is_named():
    with pytest.raises(TypeError, match="mean is float32, but x is float64: float64 does not mix"):
        vae_fast.gaussian_nll(t(4, 6).double(), t(4, 6), t(4, 6))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_latent_of_other_rows_than_x_is_refused_before_it_is_decoded(rows):
    message = rf"mu must have a row for each row of x; got mu of shape \({rows}, 3\) .* \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        vae_fast.FusedELBO()(t(4, 6), t(rows, 3), t(rows, 3), lambda z: pytest.fail("decoded"))


def test_latent_terms_of_other_rows_than_x_are_refused():
    rows = torch.zeros(8)
    with pytest.raises(ValueError, match=r"log_q must have .* B = 4 rows of x .* got \(8,\)"):
        vae_fast.fused_elbo(t(4, 6), t(8, 6), t(8, 6), rows, rows)


def test_values_are_checked_on_request(backend):
    x = t(4, 6).to(backend)
    broken = x.clone()
    broken[1, 2] = torch.nan
    vae_fast.gaussian_nll(x, broken, x)
    with vae_fast.validate():
        with pytest.raises(ValueError, match="mean must be finite, but 1 elements are not"):
            vae_fast.gaussian_nll(x, broken, x)
        with pytest.raises(ValueError, match="scale must be finite and positive"):
            vae_fast.gaussian_nll(x, x, x, "std")
        with pytest.raises(ValueError, match="mu must be finite"):
            vae_fast.reparameterize(broken, x)
        # What the mask hides is not looked at.
        vae_fast.gaussian_nll(x, broken, x, mask=torch.isfinite(broken))


def test_scales_are_checked_as_the_pass_takes_them(backend):
    """Packed ones, too, and within their bounds."""
    x, wrong = t(4, 6).to(backend), torch.cat([t(4, 6), t(4, 6) - 1], 1).to(backend)
    mu, s = t(4, 3).to(backend), t(4, 3).to(backend) - 1
    elbo = vae_fast.FusedELBO(likelihood_param="std")
    with vae_fast.validate():
        for refused in (
            lambda: vae_fast.gaussian_nll(x, wrong, None, "var"),
            lambda: vae_fast.gaussian_nll(x, wrong, None, "var", clamp=(-2.0, 1.0)),
            lambda: elbo(x, mu, mu, lambda z: wrong),
            lambda: elbo(x, mu, mu, lambda z: wrong.chunk(2, 1)),
        ):
            with pytest.raises(ValueError, match="scale must be finite and positive, but 24 elem"):
                refused()
        packed = torch.where(wrong < 0, torch.inf, wrong)
        with pytest.raises(ValueError, match="scale must be finite, but 24 elements"):
            vae_fast.gaussian_nll(x, packed, None)
        for mode in ("hard", "soft"):
            bounds = {"clamp": (0.1, 10.0), "clamp_mode": mode}
            vae_fast.gaussian_nll(x, wrong, None, "std", **bounds)
            vae_fast.reparameterize(mu, s, "var", **bounds)
            vae_fast.gaussian_kl(mu, s, None, "std", **bounds)


def test_bernoulli_data_are_probabilities(backend):
    x, mask = torch.rand(4, 6, device=backend), torch.ones(4, 6, device=backend, dtype=torch.bool)
    levels = torch.full((4, 6), 255, dtype=torch.uint8, device=backend)
    nll = functools.partial(vae_fast.likelihood_nll, likelihood="bernoulli")
    with vae_fast.validate():
        for data, options in ((x, {}), (levels, {}), (levels // 255, {"x_scale": (1, 0)})):
            assert nll(data, x, **options).shape == (4,)
        x[1, 2], x[3, 4] = -0.01, 1.01
        for data, options, count in ((x, {}, 2), (levels, {"x_scale": (1, 0)}, 24)):
            with pytest.raises(ValueError, match=rf"x must be within \[0, 1\] .* but {count} ele"):
                nll(data, data.float(), **options)
        mask[1, 2] = mask[3, 4] = False
        nll(x, x, mask=mask)


def test_logistic_data_are_levels(backend):
    levels = torch.arange(256.0, device=backend).view(4, 64)
    nll = functools.partial(vae_fast.likelihood_nll, likelihood="logistic")
    scale, mask = torch.zeros((), device=backend), torch.ones(4, 64, dtype=bool, device=backend)
    with vae_fast.validate():
        nll(levels.to(torch.uint8), levels, scale)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            x = (levels / 255).to(dtype)
            nll(x, x, scale.to(dtype))
        x = levels / 255 * 2 - 1
        nll(x, x, scale, x_scale=(2 / 255, -1.0))
        for wrong, count in ((levels, 254), (x, 128), (levels / 255 + 0.001, 256)):
            with pytest.raises(ValueError, match=rf"x must be one of the 256 .* but {count} elem"):
                nll(wrong, x, scale)
        x = levels / 255
        x[1, 2], mask[1, 2] = 0.3, False
        nll(x, x, scale, mask=mask)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("scale", ["full", "packed", "row", "event", "scalar"])
def test_values_under_a_mask_are_not_checked(scale, samples, backend):
    """Whatever the shapes of what is masked, and that it stands for."""
    x = torch.zeros(4, 6, device=backend)
    mask = torch.ones(4, 6, dtype=torch.bool, device=backend)
    mask[1] = False
    mask[:, 2] = False
    n = samples * 4
    mean = torch.zeros(n, 12 if scale == "packed" else 6, device=backend)
    shape = {"full": (n, 6), "packed": (0,), "row": (n, 1), "event": (1, 6), "scalar": ()}[scale]
    raw = torch.zeros(shape, device=backend)
    x[1], x[:, 2], mean[1::4], mean[:, 2] = (torch.nan,) * 4
    if scale == "packed":
        mean[:, 8] = torch.nan
    elif scale != "scalar":
        raw[1::4, :] = 0.0 if scale == "event" else torch.nan
        raw[:, 2:3] = torch.nan
    log_q = torch.zeros((samples, 4) if samples > 1 else 4, device=backend)
    arguments = x, mean, None if scale == "packed" else raw, log_q
    with vae_fast.validate():
        vae_fast.fused_elbo(*arguments, mask=mask)
        mean[0, 0] = torch.nan
        with pytest.raises(ValueError, match="mean must be finite, but 1 elements are not"):
            vae_fast.fused_elbo(*arguments, mask=mask)
        mean[0, 0] = 0.0
        log_q.view(-1)[0] = torch.inf
        with pytest.raises(ValueError, match="log_q must be finite"):
            vae_fast.fused_elbo(*arguments, mask=mask)


def test_terms_and_priors_are_checked_on_request(backend):
    mu, bad = t(4, 3).to(backend), torch.full((4, 3), torch.nan, device=backend)
    weight = torch.full((4,), torch.inf, device=backend)
    elbo = vae_fast.FusedELBO()
    with vae_fast.validate():
        with pytest.raises(ValueError, match="nll must be finite"):
            vae_fast.importance_bound(bad, mu)
        with pytest.raises(ValueError, match="log_p must be finite"):
            vae_fast.importance_bound(mu, mu, bad)
        with pytest.raises(ValueError, match="prior's mu must be finite"):
            vae_fast.gaussian_kl(mu, mu, (bad, mu))
        with pytest.raises(ValueError, match="prior's scale must be finite and positive"):
            vae_fast.gaussian_kl(mu, mu, (mu, mu), prior_param="std")
        with pytest.raises(ValueError, match="weight must be finite"):
            elbo(mu, mu, mu, lambda z: (z, z), weight=weight)
        for prior, what in (((bad, mu), "mu must be finite"), ((mu, -mu), "scale must be finite")):
            with pytest.raises(ValueError, match=f"prior's {what}"):
                vae_fast.FusedELBO(prior=prior, prior_param="std")(mu, mu, mu, lambda z: (z, z))


def test_a_decoder_that_returns_too_few_rows(backend):
    mu, x = t(4, 3).to(backend), t(4, 6).to(backend)
    few = (
        r"mean of shape \(4, 6\) does not fit x of shape \(4, 6\): expected \(12, 6\), one row for"
    )
    with pytest.raises(ValueError, match=few):
        vae_fast.FusedELBO(num_samples=3)(x, mu, mu, lambda z: (x, x))
    with pytest.raises(ValueError, match=r"\(3, 4, 6\) does not fit .* expected \(12, 6\)"):
        vae_fast.FusedELBO(num_samples=3)(x, mu, mu, lambda z: (x.expand(3, 4, 6), 0.0))


def test_pairs_of_any_kind(backend):
    elbo = vae_fast.FusedELBO(likelihood_clamp=np.array([-3.0, 3.0]), posterior_clamp=[-2, 2])
    assert "likelihood_clamp=(" in repr(elbo)
    assert elbo.posterior_clamp == (-2, 2)
