"""Tokens drawn by one uniform number each: against the plain inversion of the distribution function in float64."""

import numpy as np
import pytest
import torch

from rollout.sampling import draw, draw_nucleus, uniforms

SIZES = (2, 17, 64, 65, 1000, 32_000)
LARGEST = 1 - 2.0**-53


def weights(rows, size, *, seed=0, scale=3.0):
    made = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, size, generator=made) * scale).exp()


def plain(row, uniform):
    """The token on whose stretch of [0, 1) the number lies, and how far that is from the nearest border."""
    sums = np.cumsum(row.double().numpy())
    sums /= sums[-1]
    return int(np.searchsorted(sums, uniform, side="right")), float(np.abs(sums - uniform).min())


@pytest.mark.parametrize("size", SIZES)
def test_a_token_is_the_one_whose_share_the_number_falls_into(size):
    weights_BV = weights(200, size)
    uniform_B = torch.linspace(0, LARGEST, 200, dtype=torch.float64)
    checked = 0
    for row, uniform, token in zip(weights_BV, uniform_B.tolist(), draw(weights_BV, uniform_B).tolist(), strict=True):
        expected, distance = plain(row, uniform)
        if distance > 1e-6:  # nearer than that rounding may decide
            assert token == expected
            checked += 1
    assert checked > 100


def test_every_token_gets_its_share():
    row = weights(1, 300, scale=2.0)
    count = 200_000
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    counts = torch.zeros(300)
    for part in places.split(10_000):
        counts += torch.bincount(draw(row.expand(len(part), -1), part), minlength=300)
    share = row[0].double() / row.double().sum()
    # Evenly spaced numbers: each share is met but for one at either end.
    assert ((counts - share * count).abs() <= 2).all()


@pytest.mark.parametrize("size", SIZES)
def test_what_has_no_weight_is_never_drawn(size):
    weights_BV = weights(64, size)
    weights_BV[:, torch.arange(size) % 3 != 1] = 0.0
    weights_BV[:, 1] = 1e-30
    for uniform in (0.0, 1e-300, 0.3, 0.999999, LARGEST):
        tokens_B = draw(weights_BV, torch.full((64,), uniform, dtype=torch.float64))
        assert (weights_BV.gather(1, tokens_B[:, None]) > 0).all()


def test_weights_that_are_no_numbers_give_some_token_and_harm_no_other_row():
    """A broken model must not end the engine: the weight sync's proof then says what is wrong."""
    weights_BV, uniform_B = weights(3, 1000), torch.rand(3, dtype=torch.float64)
    broken_BV = weights_BV.clone()
    broken_BV[1] = torch.nan
    tokens_B = draw(broken_BV, uniform_B)
    assert 0 <= tokens_B[1] < 1000 and tokens_B[[0, 2]].tolist() == draw(weights_BV, uniform_B)[[0, 2]].tolist()
    assert 0 <= draw_nucleus(broken_BV, uniform_B, torch.full((3,), 0.9))[1] < 1000


def test_a_row_is_drawn_alike_alone_and_among_others():
    weights_BV, uniform_B = weights(50, 1000), torch.rand(50, dtype=torch.float64)
    together = draw(weights_BV, uniform_B)
    assert [int(draw(weights_BV[i : i + 1], uniform_B[i : i + 1])) for i in range(50)] == together.tolist()


def test_a_nucleus_is_the_fewest_tokens_that_reach_their_share():
    weights_BV = torch.tensor([[1.0, 5.0, 0.5, 3.0, 0.5]]).repeat(1000, 1)
    uniform_B = torch.linspace(0, LARGEST, 1000, dtype=torch.float64)
    for top_p, expected in ((0.1, {1}), (0.5, {1}), (0.51, {1, 3}), (0.85, {1, 3, 0}), (1.0, {0, 1, 2, 3, 4})):
        tokens = draw_nucleus(weights_BV, uniform_B, torch.full((1000,), top_p))
        assert set(tokens.tolist()) == expected
    kept = draw_nucleus(weights_BV, uniform_B, torch.full((1000,), 0.79))
    assert (kept == 1).double().mean() == pytest.approx(5 / 8, abs=2e-3)  # within it the shares stay in proportion


def test_numbers_follow_from_seed_and_place_alone():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = uniforms([1234567] * 4, [0, 1, 2, 3])  # splitmix64's published test vector
    assert found.tolist() == [(value >> 11) * 2.0**-53 for value in known]
    assert uniforms([2**64 - 1], [2**40]).shape == (1,)


def test_numbers_are_even_and_unrelated():
    over_places = uniforms([7] * 100_000, range(100_000))
    over_seeds = uniforms(range(100_000), [0] * 100_000)
    for numbers in (over_places, over_seeds):
        counts = np.bincount((numbers * 100).astype(int), minlength=100)
        assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-square, 99 degrees of freedom: above 150 in 1 of 1,000
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(over_places, over_seeds)[0, 1]) < 0.015
