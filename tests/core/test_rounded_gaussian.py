"""Rounded Gaussians are exact, whatever floating point does, and distributed as they should be."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import mpmath
import numpy as np
import pytest
from scipy import stats

from dptrain.core import rounded_gaussian
from dptrain.core.entropy import Key
from dptrain.core.gaussian import BLOCK, PAIRS, Place
from dptrain.core.noise import noisy_mean_on_grid
from dptrain.core.rounded_gaussian import RoundedGaussians, streams_of

KEY = Key.from_seed(11)  # fixed: these tests pass or fail, they do not flicker
USUAL = 1.3 * 2.0**24


def drawn(stddev, size=2**15, block=0, name="w", key=KEY):
    source = RoundedGaussians(key, stddev, (size + 1) // 2)
    return source.draw([Place(streams_of(name), block * PAIRS, (size + 1) // 2)])[0].copy()


def first_words(name, pairs):
    """Of radii and of angles, straight from the keystream."""
    words = np.empty((2, pairs), np.uint64)
    source = RoundedGaussians(KEY, 3.0, pairs)._source
    for row, begin in zip(words, streams_of(name)):
        source.fill(row.data.cast("B"), begin)
    return words


def in_many_digits(stddev, radius, angle):
    """Both numbers of a pair, before rounding, from 64 bits and half a cell."""
    with mpmath.workprec(500):
        u, v = ((mpmath.mpf(int(word)) + 0.5) / 2**64 for word in (radius, angle))
        length = stddev * mpmath.sqrt(-2 * mpmath.log(u))
        return length * mpmath.cos(2 * mpmath.pi * v), length * mpmath.sin(2 * mpmath.pi * v)


@pytest.mark.parametrize("stddev", [1.0, 3.0, USUAL, 2.0**32])
def test_every_number_is_what_many_digits_say(stddev):
    pairs = 400
    words, numbers = first_words("w", pairs), drawn(stddev)
    compared = 0
    for i in range(pairs):
        for got, exact in zip(numbers[:, i], in_many_digits(stddev, *words[:, i])):
            if abs(exact - mpmath.nint(exact)) < 0.499:  # 64 bits decide
                assert int(got) == int(mpmath.nint(exact))
                compared += 1
    assert compared > 1.9 * pairs


@pytest.mark.parametrize("stddev", [3.0, USUAL, 2.0**32])
def test_the_numbers_do_not_depend_on_floating_point(stddev, monkeypatch):
    """With an accuracy a million times worse, far more is computed at length: to the same end."""
    size = 2**15
    plain = drawn(stddev, size)
    calls = []
    exactly = RoundedGaussians._exactly
    monkeypatch.setattr(
        RoundedGaussians, "_exactly", lambda self, *pair: calls.append(pair) or exactly(self, *pair)
    )
    monkeypatch.setattr(rounded_gaussian, "ACCURACY", 2.0**-12 / stddev)
    assert np.array_equal(drawn(stddev, size), plain)
    assert calls


def test_without_the_bound_some_numbers_would_be_wrong(monkeypatch):
    """What the comparison with many digits can see."""
    right = drawn(2.0**32, BLOCK)
    monkeypatch.setattr(rounded_gaussian, "ACCURACY", 0.0)
    wrong = right != drawn(2.0**32, BLOCK)
    assert 0 < wrong.sum() < 1000


def test_numpy_is_as_accurate_as_is_assumed():
    """With a margin: the assumption is 2^-46."""
    rng = np.random.default_rng(0)
    u = np.concatenate(
        [rng.random(1000), 1 - 2.0 ** -rng.uniform(1, 53, 1000), 2.0 ** -rng.uniform(0, 64, 1000)]
    )
    angles = np.concatenate(
        [math.pi * (2 * rng.random(2000) - 1), math.pi / 2 * (1 + rng.random(500) * 2.0**-30)]
    )
    logs, roots, cosines, sines = np.log(u), np.sqrt(u), np.cos(angles), np.sin(angles)
    with mpmath.workprec(200):
        for x, log, root in zip(u, logs, roots):
            exact = mpmath.log(mpmath.mpf(x))
            assert abs(log - exact) <= 2.0**-50 * abs(exact)
            assert abs(root / mpmath.sqrt(mpmath.mpf(x)) - 1) <= 2.0**-50
        for x, cosine, sine in zip(angles, cosines, sines):
            exact = mpmath.mpf(x)
            assert max(abs(cosine - mpmath.cos(exact)), abs(sine - mpmath.sin(exact))) <= 2.0**-50


@pytest.mark.parametrize("stddev", [1.0, USUAL, 2.0**32])
def test_the_bound_holds(stddev):
    """Wherever the words lie: near 0, near 1, where R is 5, and near the turns of the cosine."""
    edge = int(math.exp(-12.5) * 2**64)
    radii = [1, 2**40, edge, edge * 2, 2**60, 2**63, 2**64 - 1, 2**64 - 2**20, 2**64 - 2**43]
    radii += [int(r) for r in np.random.default_rng(1).integers(edge, 2**64, 40, dtype=np.uint64)]
    angles = [
        0,
        1,
        2**61 - 1,
        2**62,
        2**62 + 3,
        2**63 - 1,
        2**63,
        2**64 - 1,
        3 * 2**62 + 5,
        12345678901234567,
    ]
    source = RoundedGaussians(KEY, stddev, len(radii) * len(angles))
    words = np.array(list(itertools.product(radii, angles)), np.uint64).T.copy()
    numbers = np.empty(words.shape)
    doubtful = source._fast(words, numbers)
    certain = 0
    for i in range(words.shape[1]):
        exact = in_many_digits(stddev, *words[:, i])
        for row in range(2):
            if not doubtful[row, i]:
                # the other bits of u and v move it by less than is left to a half-integer
                assert abs(numbers[row, i] - exact[row]) < 0.5
                certain += 1
    assert certain > 0.5 * words.size


def test_hostile_words_are_computed_at_length(monkeypatch):
    """A keystream of zeros: u is 2^-321, and nothing overflows or is undefined."""

    def zeros(self, buffer, counter):
        buffer[:] = bytes(len(buffer))

    monkeypatch.setattr(rounded_gaussian.Keystream, "fill", zeros)
    numbers = drawn(USUAL, 8)
    radius = USUAL * math.sqrt(2 * 321 * math.log(2))
    assert abs(numbers[0, 0] - radius) < 1
    assert abs(numbers[1]).max() == 0


def test_further_bits_decide(monkeypatch):
    """Where 64 bits leave a number between two integers, those that follow count."""
    source = RoundedGaussians(KEY, 2.0**32, 1)
    ends = [source._exactly(5, 2**61, bits) for bits in ((0, 0), (2**256 - 1, 2**256 - 1))]
    assert ends[0][0] - ends[1][0] > 2**24


def test_a_block_is_what_it_is_however_it_is_drawn():
    sizes = {"large": 2 * BLOCK + 12_345, "odd": 12_345, "one": 1, "bias": 100, "none": 0, "scalar": None}
    shape = {name: () if size is None else (size,) for name, size in sizes.items()}

    def noise(names, threads):
        sums = {name: np.zeros(shape[name], np.int64) for name in names}
        out = {name: np.empty(shape[name]) for name in names}
        noisy_mean_on_grid(sums, out, 3.0, 2.0**-22, 1.0, KEY, threads)
        return {name: x / 2.0**-22 for name, x in out.items()}

    want = noise(sizes, 1)
    for names, threads in ((list(sizes)[::-1], 3), (["odd"], 1), (["large"], 2)):
        got = noise(names, threads)
        assert all(np.array_equal(got[name], want[name]) for name in names)
    stddev = math.nextafter(3.0, 4) * 2.0**22
    second = drawn(stddev, BLOCK, 1, "large")
    assert np.array_equal(want["large"][BLOCK : 2 * BLOCK], second.reshape(-1))
    assert not np.intersect1d(want["large"][:100], want["odd"][:100]).size
    assert not np.array_equal(drawn(USUAL, 100), drawn(USUAL, 100, key=Key.from_seed(12)))


def test_sum_and_noise_are_added_in_integers():
    total = np.array([2**62, -(2**62), 7, 0])
    out, silent = np.empty(4), np.empty(4)
    noisy_mean_on_grid({"w": np.zeros(4, np.int64)}, {"w": silent}, 1.0, 2.0**-2, 1.0, KEY, 1)
    noisy_mean_on_grid({"w": total}, {"w": out}, 1.0, 2.0**-2, 1.0, KEY, 1)
    noise = (silent * 4).astype(np.int64)
    assert np.array_equal(out, (total + noise) * 0.25)
    narrow = np.empty(4, np.float32)
    noisy_mean_on_grid({"w": total}, {"w": narrow}, 1.0, 2.0**-2, 10.0, KEY, 1)
    assert np.array_equal(narrow, ((total + noise) * (0.25 / 10)).astype(np.float32))


@pytest.mark.parametrize("stddev", [0.5, 0.0, 2.0**33, math.inf, math.nan])
def test_standard_deviations_that_cannot_be_drawn_are_refused(stddev):
    with pytest.raises(ValueError, match="1 to 2\\^32 grid spacings"):
        RoundedGaussians(KEY, stddev, 4)


def test_parameters_too_large_for_their_stream_are_refused():
    huge = np.broadcast_to(np.zeros(1, np.int64), 2**31 + 1)
    with pytest.raises(ValueError, match=r"at most 2\^31"):
        noisy_mean_on_grid({"w": huge}, {"w": huge}, 1.0, 2.0**-2, 1.0, KEY, 1)


# ---- goodness of fit


class Tally:
    """Counts and sums of many draws, a block at a time, and what they say of the distribution."""

    CELLS = 4096
    BITS = 10  # low ones of a number, uniform where s is large

    def __init__(self, stddev):
        self.stddev, self.size = stddev, 0
        self.small = np.zeros(int(16 * stddev) + 1, np.int64) if stddev < 100 else None
        self.cells, self.low = np.zeros(self.CELLS, np.int64), np.zeros(2**self.BITS, np.int64)
        self.moments, self.products = np.zeros(4), np.zeros(4)
        self.tails = np.zeros((2, 7), np.int64)

    def add(self, x):
        """``[2, pairs]``: cosines and sines."""
        flat = x.reshape(-1)
        self.size += flat.size
        z = flat / self.stddev
        square = z * z
        self.moments += [z.sum(), square.sum(), (square * z).sum(), (square * square).sum()]
        cosines, sines = z[: x.shape[1]], z[x.shape[1] :]
        self.products += [
            np.dot(z[:-1], z[1:]),
            2 * np.dot(cosines, sines),
            np.dot(square[:-1] - 1, square[1:] - 1) / 2,
            np.dot(square[: x.shape[1]] - 1, square[x.shape[1] :] - 1),
        ]
        for sigmas in range(2, 7):
            far = sigmas * self.stddev
            self.tails[:, sigmas] += [(flat > far).sum(), (flat < -far).sum()]
        if self.small is not None:
            middle = len(self.small) // 2
            self.small += np.bincount(np.clip(flat + middle, 0, 2 * middle), minlength=len(self.small))
        else:
            self.low += np.bincount(flat & (2**self.BITS - 1), minlength=2**self.BITS)
            cells = np.floor((z + 4) * (self.CELLS / 8)).astype(np.int64)
            self.cells += np.bincount(np.clip(cells, 0, self.CELLS - 1), minlength=self.CELLS)

    def probabilities(self):
        """Of each test, of something as unlikely."""
        n, s = self.size, self.stddev
        rounding = 1 / (12 * s * s)  # what rounding adds to the variance
        expected = np.array([0, 1 + rounding, 0, 3 * (1 + rounding) ** 2])
        errors = (self.moments / n - expected) / np.sqrt(np.array([1, 2, 15, 96]) / n)
        found = {f"moment {i + 1}": 2 * stats.norm.sf(abs(e)) for i, e in enumerate(errors)}
        found |= {
            f"correlation {i}": 2 * stats.norm.sf(abs(p) / math.sqrt(v * n))
            for i, (p, v) in enumerate(zip(self.products, (1, 2, 1, 2)))
        }
        for sigmas, side in itertools.product(range(2, 7), range(2)):
            expected = n * stats.norm.sf((math.floor(sigmas * s) + 0.5) / s)
            count = self.tails[side, sigmas]
            found[f"tail {sigmas}, {side}"] = 2 * min(
                stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected)
            )
        if self.small is not None:
            edges = (np.arange(len(self.small) + 1) - len(self.small) // 2 - 0.5) / s
            found["integers"] = self._chi_square(self.small, edges)
        else:
            found["cells"] = self._chi_square(self.cells, np.linspace(-4, 4, self.CELLS + 1))
            found["low bits"] = stats.chisquare(self.low).pvalue
        return found

    def _chi_square(self, counts, edges):
        edges = np.array(edges)
        edges[0], edges[-1] = -np.inf, np.inf
        expected = self.size * np.where(
            edges[:-1] > 0, -np.diff(stats.norm.sf(edges)), np.diff(stats.norm.cdf(edges))
        )
        common = expected >= 20
        rare = counts[~common].sum(), expected[~common].sum()
        counts, expected = np.append(counts[common], rare[0]), np.append(expected[common], rare[1])
        if expected[-1] < 20:
            counts, expected = counts[:-1], expected[:-1] / expected[:-1].sum() * counts[:-1].sum()
        return stats.chisquare(counts, expected).pvalue


def fit(stddev, size, key=KEY):
    blocks = range(size // BLOCK)
    tally = Tally(stddev)

    def some(share):
        mine, source = Tally(stddev), RoundedGaussians(key, stddev, BLOCK // 2)
        for block in share:
            mine.add(source.draw([Place(streams_of("w"), block * PAIRS, PAIRS)])[0])
        return mine

    with ThreadPoolExecutor(2) as pool:
        for part in pool.map(some, (blocks[::2], blocks[1::2])):
            for name, value in vars(part).items():
                if name == "size" or isinstance(value, np.ndarray):
                    setattr(tally, name, getattr(tally, name) + value)
    return tally.probabilities()


@pytest.mark.parametrize("stddev", [3.0, 2.0**24])
def test_goodness_of_fit_on_ten_million(stddev):
    found = fit(stddev, 10**7)
    assert min(found.values()) > 1e-6, found


def test_the_tests_of_fit_see_a_wrong_deviation(monkeypatch):
    monkeypatch.setattr(RoundedGaussians, "__init__", _scaled(1.002))
    assert min(fit(3.0, 10**7).values()) < 1e-6


def _scaled(factor):
    make = RoundedGaussians.__init__
    return lambda self, key, stddev, pairs: make(self, key, factor * stddev, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("stddev", [3.0, 2.0**24])
def test_goodness_of_fit_on_a_billion(stddev):
    found = fit(stddev, 10**9)
    print({name: float(f"{p:.3g}") for name, p in found.items()})
    assert min(found.values()) > 1e-6, found
