"""The noise is normal, secret, and the same however it is drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import dptrain.torch as dpt
from dptrain.core import gaussian
from dptrain.core.entropy import Key
from dptrain.core.gaussian import BLOCK, PAIRS, Gaussians, Place, streams_of
from dptrain.core.keystream import Keystream, streams
from dptrain.core.mechanism import Mechanism
from dptrain.core.noise import Span
from dptrain.torch import noise
from dptrain.torch.noise import noisy_mean, noisy_mean_on_grid

KEY = Key.from_seed(7)  # fixed: these tests pass or fail, they do not flicker
SIZE = 3 * BLOCK + 12_345

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def draw(size: int, name: str = "w", key: Key = KEY, dtype=torch.float32, stddev=1.0) -> torch.Tensor:
    return noisy_mean({name: torch.zeros(size, dtype=dtype)}, stddev, 1.0, key)[name]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors: normal for independent numbers."""
    a, b = a.double(), b.double()
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    return float((a * b).mean()) * math.sqrt(len(a))


@BOTH
def test_numbers_are_normal(dtype):
    x = draw(SIZE, dtype=dtype).double().numpy()
    n = len(x)
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs((x**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    for half in (x[: BLOCK // 2], x[BLOCK // 2 : BLOCK]):  # cosines, sines
        assert stats.kstest(half, "norm").pvalue > 1e-3


@BOTH
def test_the_standard_deviation_is_right_to_a_third_of_a_percent(dtype):
    """With 1.6 million numbers it is known to 0.06 %."""
    x = draw(SIZE, dtype=dtype, stddev=0.3)
    assert abs(float(x.double().std()) / 0.3 - 1) < 0.0033


@BOTH
def test_tails_have_their_weight(dtype):
    x = torch.cat([draw(2**22, name, dtype=dtype) for name in "abcd"])
    for bound in (3.0, 4.0, 4.5):
        for part in (x, -x):
            expected = len(x) * stats.norm.sf(bound)
            assert abs(int((part > bound).sum()) - expected) < 5 * math.sqrt(expected)
    assert 4.9 < float(x.abs().max()) < 7


@BOTH
def test_neighbours_pairs_blocks_and_parameters_are_independent(dtype):
    x, y = draw(SIZE, "x", dtype=dtype), draw(SIZE, "y", dtype=dtype)
    half = BLOCK // 2
    pairs = (
        (x[:-1], x[1:]),
        (x[:half], x[half:BLOCK]),  # a cosine and a sine with one radius
        (x[:BLOCK], x[BLOCK : 2 * BLOCK]),
        (x, y),
    )
    for a, b in pairs:
        assert abs(correlation(a, b)) < 5
        assert abs(correlation(a**2, b**2)) < 5
        assert abs(correlation(a.abs(), b)) < 5


@BOTH
def test_a_block_is_what_it_is_however_it_is_drawn(dtype, monkeypatch):
    """Whatever the number of threads, the order and the company of parameters."""
    sizes = {"large": SIZE, "odd": 12_345, "one": 1, "bias": 100, "other": BLOCK + 1, "none": 0}
    sums = {name: torch.zeros(size, dtype=dtype) for name, size in sizes.items()}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = noisy_mean(sums, 1.0, 1.0, KEY)
        torch.set_num_threads(3)
        got = noisy_mean(dict(reversed(sums.items())), 1.0, 1.0, KEY)
    finally:
        torch.set_num_threads(threads)
    for name, size in sizes.items():
        assert torch.equal(want[name], got[name])
        assert torch.equal(want[name], draw(size, name, dtype=dtype))
    kind = want["large"].numpy().dtype
    second = Gaussians(KEY, kind, 1.0, BLOCK // 2).draw([Place(streams_of("large"), PAIRS, PAIRS)])[0]
    assert torch.equal(want["large"][BLOCK : 2 * BLOCK], torch.from_numpy(second).flatten())


def test_keys_and_names_decide():
    assert torch.equal(draw(1000), draw(1000))
    other = (
        Key(bytes([1]) + bytes(31), reproducible=False),
        Key(bytes([0, 1]) + bytes(30), reproducible=False),
    )
    drawn = [draw(1000), draw(1000, "v"), *(draw(1000, key=key) for key in other)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert not (a == b).any()


def test_strides_do_not_matter():
    total = torch.randn(300, 500)
    want = noisy_mean({"w": total}, 1.0, 10.0, KEY)["w"]
    turned = total.T.contiguous().T
    got = noisy_mean({"w": turned}, 1.0, 10.0, KEY)["w"]
    assert got.stride() == turned.stride() and torch.equal(got, want)
    channels_last = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    for total in (channels_last, torch.ones(1).expand(40), torch.tensor(2.0)):
        want = noisy_mean({"w": total.contiguous()}, 1.0, 10.0, KEY)["w"]
        assert torch.equal(noisy_mean({"w": total}, 1.0, 10.0, KEY)["w"], want)


@BOTH
def test_it_is_the_sum_and_the_noise_over_the_batch_size(dtype):
    total = torch.randn(SIZE, dtype=dtype)
    before = total.clone()
    noise = draw(SIZE, dtype=dtype, stddev=3.0)
    got = noisy_mean({"w": total}, 3.0, 10.0, KEY)["w"]
    torch.testing.assert_close(got, (total + noise) / 10)
    assert torch.equal(total, before)
    silent = noisy_mean({"w": total}, 0.0, 10.0, KEY)["w"]
    torch.testing.assert_close(silent, total / 10)
    noisy_mean({"w": total}, 3.0, 10.0, KEY, out={"w": total})
    assert torch.equal(total, got)


def test_float64_noise_has_the_digits_of_float64():
    x = draw(10_000, dtype=torch.float64)
    assert (x != x.float().double()).float().mean() > 0.99


def test_small_uniforms_get_more_bits(monkeypatch):
    """Radii go on beyond 6.66, where 32 bits end, and up to 9.49."""
    source = Gaussians(KEY, np.dtype(np.float32), 1.0, 4096)
    place, ends = Place(streams_of("w"), 5 * PAIRS, 4096), [0, 4096]
    words = np.zeros(4096, np.uint32)
    inverse = np.empty(4096, np.float32)
    source._inverse_uniform(words, [place], ends, inverse)
    u = 1 / inverse.astype(float) * 2**32  # uniform again, given that 32 bits were zero
    assert len(np.unique(u)) > 4000 and stats.kstest(u, "uniform").pvalue > 1e-3
    monkeypatch.setattr(
        source._source, "fill", lambda buffer, counter: buffer.__setitem__(slice(None), bytes(4))
    )
    words = np.zeros(4096, np.uint32)
    source._inverse_uniform(words, [place], ends, inverse)
    assert math.isclose(math.sqrt(2 * math.log(inverse.max())), 9.49, rel_tol=1e-3)


def test_further_bits_change_nothing_but_the_far_tail(monkeypatch):
    plain = draw(BLOCK)
    monkeypatch.setattr(gaussian, "_SMALL", 2**22)
    more = draw(BLOCK)
    moved = plain != more
    assert 0 < int(moved.sum()) < BLOCK / 500
    torch.testing.assert_close(plain, more, rtol=2e-4, atol=0)


def test_the_keystream_is_aes_256_in_counter_mode():
    """NIST SP 800-38A, F.5.5."""

    class Vector:
        def cipher_key(self):
            return bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")

    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    coded = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    first = int.from_bytes(bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), "big")
    source = Keystream(Vector(), 64)
    got = bytearray(64)
    source.fill(memoryview(got), first)
    assert bytes(a ^ b for a, b in zip(got, plain)) == coded
    source.fill(memoryview(got)[:32], first + 2)
    assert bytes(a ^ b for a, b in zip(got[:32], plain[32:])) == coded[32:]


def test_streams_lie_far_apart():
    places = sorted(begin for name in ("a", "b", "ab", "layer.1", "layer.11") for begin in streams(name, 3))
    assert all(b - a >= 2**32 for a, b in itertools.pairwise(places))


def cuts(size: int) -> list[tuple[int, int]]:
    """Spans that an owner may hold: even and odd ends, within a block, over several, one element, none."""
    ends = sorted({0, 1, 2, 7, size // 3, size // 2 + 1, size - 1, size} & set(range(size + 1)))
    return [*itertools.pairwise(ends), (0, size), (size // 2, size // 2)]


SPANS = pytest.mark.parametrize("size", [1, 2, 9, 1000, BLOCK - 1, BLOCK, 2 * BLOCK + 333])


@BOTH
@SPANS
def test_whoever_owns_an_element_draws_the_same_for_it(size, dtype):
    whole = draw(size, dtype=dtype)
    for begin, end in cuts(size):
        part = {"w": torch.zeros(end - begin, dtype=dtype)}
        got = noisy_mean(part, 1.0, 1.0, KEY, spans={"w": Span(begin, size)})["w"]
        assert torch.equal(got, whole[begin:end])


@SPANS
def test_whoever_owns_an_element_draws_the_same_rounded_number(size):
    def draw(begin: int, end: int) -> torch.Tensor:
        part, spans = {"w": torch.zeros(end - begin, dtype=torch.int64)}, {"w": Span(begin, size)}
        return noisy_mean_on_grid(part, 1000.0, 1.0, 1.0, KEY, spans)["w"]

    whole = draw(0, size)
    assert size < 1000 or float(whole.std()) == pytest.approx(1000, rel=0.1)
    for begin, end in cuts(size):
        assert torch.equal(draw(begin, end), whole[begin:end])


def test_noise_of_a_device_is_keyed_and_scaled_alike(monkeypatch):
    """The way of GPUs, on a CPU."""
    monkeypatch.setattr(noise, "DEVICE_BLOCK", 2**18)
    size = 10**6
    whole = noise.drawn(Span(0, size), torch.empty(1000, 1000), 0.5, KEY)
    assert whole.shape == (1000, 1000) and abs(float(whole.mean())) < 0.0025
    assert abs(float(whole.std()) / 0.5 - 1) < 0.0035
    assert torch.equal(noise.drawn(Span(0, size), whole, 0.5, KEY), whole)
    assert not (noise.drawn(Span(0, size), whole, 0.5, KEY.child(1)) == whole).any()
    blocks = whole.flatten()[: 3 * 2**18].view(3, -1)
    assert not (blocks[0] == blocks[1]).any() and abs(correlation(blocks[0], blocks[1])) < 5
    for begin, end in cuts(size):
        part = noise.drawn(Span(begin, size), torch.empty(end - begin), 0.5, KEY)
        assert torch.equal(part, whole.flatten()[begin:end])


MECHANISM = Mechanism.constant(
    noise_multiplier=2.0, clip_norm=0.5, sample_rate=0.5, steps=3, expected_batch_size=10, delta=1e-5
)


def clipped_sum(**grads: torch.Tensor) -> dpt.ClippedSum:
    return dpt.ClippedSum(grads, torch.zeros(1), torch.zeros(1), 0.5)


def test_a_donated_sum_is_empty_afterwards():
    total = torch.randn(1000)
    want = dpt.privatize(clipped_sum(w=total), MECHANISM, KEY).grads["w"]
    given = clipped_sum(w=total)
    gradient = dpt.privatize(given, MECHANISM, KEY, donate=True)
    assert torch.equal(gradient.grads["w"], want) and gradient.grads["w"] is total
    assert not given.grads
    with pytest.raises(ValueError, match="given away"):
        dpt.privatize(given, MECHANISM, KEY)


def test_donated_sums_that_share_memory_get_noise_of_their_own():
    """In place, the noise of one would be added to the other, and once to what should have two."""
    whole = torch.randn(200)
    shared = {"a": whole, "b": whole, "c": whole[:100], "d": whole[:1].expand(7)}
    want = dpt.privatize(clipped_sum(**{n: g.clone() for n, g in shared.items()}), MECHANISM, KEY).grads
    got = dpt.privatize(clipped_sum(**shared), MECHANISM, KEY, donate=True).grads
    for name in shared:
        assert torch.equal(got[name], want[name])


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("method", ["auto", "per-example", "bk-ghost", "ghost"])
def test_a_sum_owns_its_memory(method, batch_size):
    """What is given away is not written again by a later step, which would be without noise."""
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(24, 3))
    clipped = dpt.clipped_grad(
        model, lambda model, x: model(x).square().sum(1), clip_norm=MECHANISM.clip_norm, method=method
    )
    gradient = dpt.privatize(clipped(torch.randn(batch_size, 2, 8)), MECHANISM, KEY, donate=True)
    before = {name: g.clone() for name, g in gradient.grads.items()}
    clipped(torch.randn(batch_size, 2, 8))
    for name, g in gradient.grads.items():
        assert torch.equal(g, before[name])
        for other in clipped._workspace._held.values():
            assert g.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_does_not_depend_on_strides(fused):
    """torch's fused SGD on a CPU reads a gradient in the order of its memory."""
    model = torch.nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    total = torch.randn(3, 4).T
    gradient = dpt.privatize(clipped_sum(weight=total), MECHANISM, KEY)
    dpt.apply(torch.optim.SGD(model.parameters(), lr=1.0, fused=fused), model, gradient)
    torch.testing.assert_close(model.weight.detach(), -gradient.grads["weight"])
    assert model.weight.grad is None
