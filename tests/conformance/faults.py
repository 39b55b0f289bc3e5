"""Seeded faults: ways in which a library of differential privacy goes wrong, planted in ours on purpose.

    with FAULTS["half-noise"].planted():
        ...  # every ordinary path of dptrain now adds half of the noise

The conformance suite must catch each of them, and the audit by itself those that raise ε by more than
twofold. ``epsilon_factor`` is meant for a typical mechanism: δ = 1e-5, q = 1 %, 1000 steps, ε = 4, hence
σ = 0.735, and over all data sets, as differential privacy is defined. There a sensitivity that is k times
what it is taken for has ε grow 2.9-fold (k = √2), 9-fold (k = 2) and more than 100-fold (k > 4.6).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from .plants import noise, sampling
from .plants.common import Patch

ENGINES = ("torch", "jax")
MORE_THAN_A_HUNDRED = 100.0


@dataclass(frozen=True)
class Fault:
    """A way to be wrong.

    Attributes:
        name: short, with hyphens.
        what: what the library then does.
        engines: where it can be planted, of "torch" and "jax".
        epsilon_factor: true ε over stated ε for a typical mechanism; infinite where nothing is promised
            any more, 1 where utility or the letter of the mechanism suffers and ε hardly.
        why: one line of argument for that number, and who sees the fault where not everyone does.
        caught_by: the tests of the conformance suite that must fail.
    """

    name: str
    what: str
    engines: tuple[str, ...]
    epsilon_factor: float
    why: str
    caught_by: tuple[str, ...]
    _plants: Mapping[str, Callable[..., None]] = field(repr=False)

    @contextmanager
    def planted(self, engine: str | None = None) -> Iterator[None]:
        """dptrain with this fault; what JAX compiled before does not have it, so make everything anew.

        engine: plant it there only; by default wherever it can be. Nothing else is imported.
        """
        with ExitStack() as undo:
            patch = Patch(undo)
            if "core" in self._plants:
                self._plants["core"](patch)
            for name in self.engines:
                if name in self._plants and name == (engine or name) and importlib.util.find_spec(name):
                    self._plants[name](patch)
            yield


FAULTS: dict[str, Fault] = {}


def _fault(
    name: str,
    what: str,
    epsilon_factor: float,
    why: str,
    caught_by: str,
    *,
    core: Callable[[Patch], None] | None = None,
    door: Callable[[Patch, str], None] | None = None,
    clipping: tuple[str, ...] = (),
) -> None:
    """core: planted once for both engines. door: at the door of each. clipping: by the function of this name
    in ``plants.torch_clipping`` and ``plants.jax_clipping``, one or both."""
    plants: dict[str, Callable[..., None]] = {}
    if core is not None:
        plants["core"] = core
    for engine in ENGINES:
        if door is not None:
            plants[engine] = lambda patch, engine=engine: door(patch, engine)
    for engine in clipping:

        def plant(patch: Patch, engine: str = engine) -> None:
            room = importlib.import_module(f"{__package__}.plants.{engine}_clipping")
            getattr(room, name.replace("-", "_"))(patch)

        plants[engine] = plant
    engines = ENGINES if core is not None else tuple(plants)
    FAULTS[name] = Fault(
        name, what, engines, epsilon_factor, why, tuple(f"test_{c}" for c in caught_by.split()), plants
    )


# ---------------------------------------------------------------------------------------------- noise

_fault(
    "no-noise",
    "nothing is added to the sum",
    math.inf,
    "the release is the clipped sum itself.",
    "noise_has_the_stated_standard_deviation",
    door=noise.scaled_noise(0),
)
_fault(
    "half-noise",
    "the noise has half of its standard deviation",
    9.1,
    "the cost of σ/2, by PLD.",
    "noise_has_the_stated_standard_deviation",
    door=noise.scaled_noise(0.5),
)
_fault(
    "noise-divided-twice",
    "the noise is scaled for the mean, and divided by L with the sum once more",
    MORE_THAN_A_HUNDRED,
    "the noise on the sum is σ C / L.",
    "noise_has_the_stated_standard_deviation",
    door=noise.divided_twice,
)
_fault(
    "noise-for-another-clip-norm",
    "the standard deviation of the noise is σ instead of σ C",
    MORE_THAN_A_HUNDRED,
    "at C = 4.63, as in the paper; less noise than stated where C > 1, more where C < 1.",
    "noise_has_the_stated_standard_deviation",
    core=noise.without_the_clip_norm,
)
_fault(
    "repeated-noise",
    "every step adds the same noise",
    math.inf,
    "the difference of two releases holds none.",
    "noise_is_new_in_every_step",
    door=noise.repeated,
)
_fault(
    "same-noise-for-all-parameters",
    "the noise of each parameter begins with the same numbers",
    math.inf,
    "the difference of two parameters' gradients holds none.",
    "parameters_do_not_share_noise",
    core=noise.same_for_all_parameters,
)
_fault(
    "noise-in-bfloat16",
    "noise is rounded to bfloat16 before it is added to a sum in float32",
    math.inf,
    "the noise lies on a coarse grid, so that the low digits of a release are the sum's: an adversary who "
    "knows two candidates for the sum subtracts each and looks which difference is a number of bfloat16.",
    "noise_has_all_digits_of_float32",
    door=noise.in_bfloat16,
)
_fault(
    "noise-only-where-a-gradient-is",
    "parameters whose sum is exactly zero get no noise",
    math.inf,
    "a zero in the release says that no sampled example touches the parameter.",
    "every_element_of_every_parameter_gets_noise",
    door=noise.only_where_a_gradient_is,
)
_fault(
    "empty-batch-skipped",
    "a logical batch without examples takes no step and no noise",
    math.inf,
    "of an empty data set nothing but zeros is released: of one with a single example, noise.",
    "an_empty_batch_takes_a_noisy_step",
    door=noise.empty_batch_skipped,
)
_fault(
    "noise-per-physical-batch",
    "noise is added once for each physical batch",
    1.0,
    "more noise than stated, which costs utility.",
    "noise_has_the_stated_standard_deviation",
    door=noise.per_physical_batch,
)
_fault(
    "noise-on-the-mean",
    "the sum is divided by the realised batch size, the noise by L",
    9.1,
    "of two examples with opposite gradients, a batch of one in place of two moves the mean by C, not C / L; "
    "at realised sizes near L the sensitivity is 2 C / L.",
    "a_release_is_the_sum_of_the_clipped_gradients_of_its_batch_over_the_public_size",
    door=noise.on_the_mean,
)
_fault(
    "divided-by-the-realised-batch",
    "sum and noise are divided by the realised batch size",
    math.inf,
    "with many parameters the scale of the noise tells the realised size: of one example or two, whether "
    "the second was there. At typical batch sizes others' sampling hides most of it.",
    "a_release_is_the_sum_of_the_clipped_gradients_of_its_batch_over_the_public_size",
    door=noise.divided_by_the_realised_batch,
)

_fault(
    "divided-by-the-data-set",
    "sum and noise are divided by int(q N), N the size of the data set",
    math.inf,
    "where q N crosses a whole number the scale of the noise tells N, which add-or-remove-one keeps secret: "
    "Opacus issues 571 and 819. Nothing where N is public, as it is here.",
    "a_release_is_the_sum_of_the_clipped_gradients_of_its_batch_over_the_public_size",
    door=noise.divided_by_the_data_set,
)

# ----------------------------------------------------------------------------------------- randomness

_fault(
    "constant-seed",
    "a fresh key is always the same one",
    math.inf,
    "whoever has the library can subtract the noise.",
    "without_a_key_randomness_is_fresh",
    core=noise.constant_seed,
)
_fault(
    "keys-used-twice",
    "the noise and the sample of a step come from one key",
    1.0,
    "the two are derived by different hashes, so nothing is known to follow; but the rule is broken by which "
    "it would.",
    "every_key_is_used_for_one_thing",
    core=noise.keys_by_number_alone,
)

# ------------------------------------------------------------------------------------------- sampling

_fault(
    "twice-the-sample-rate",
    "examples are drawn with twice the probability that is accounted",
    2.0,
    "where amplification counts, ε is nearly proportional to q (1.99); and it is nothing at q = 1.",
    "examples_are_drawn_at_the_stated_rate",
    core=sampling.rate(lambda q: 2 * q),
)
_fault(
    "rounded-sample-rate",
    "examples are drawn at one over a whole number of steps an epoch",
    1.0,
    "nothing at small q; at q = 0.4 it is 0.5.",
    "examples_are_drawn_at_the_stated_rate",
    core=sampling.rate(lambda q: 1 / math.floor(1 / q)),
)
_fault(
    "shuffled",
    "the data set is shuffled and cut into batches, but accounted as Poisson sampling",
    2.0,
    "from nothing at large σ to more than fourfold below 0.5 (Chua et al. 2024, arXiv 2403.17673).",
    "batch_sizes_vary_as_those_of_poisson_samples_do batches_are_independent_of_each_other",
    core=sampling.shuffled,
)
_fault(
    "fixed-size-as-poisson",
    "each batch has exactly q N examples, but is accounted as Poisson sampling",
    9.1,
    "an example that is drawn displaces another, so that the sum moves by 2 C: seen where their gradients "
    "are opposite.",
    "batch_sizes_vary_as_those_of_poisson_samples_do",
    core=sampling.of_a_fixed_size,
)
_fault(
    "truncated-to-the-buffer",
    "examples beyond the expected batch size are left out",
    5.6,
    "half of the time an example displaces another, so that the sum moves by 2 C (q / 2, σ / 2, by PLD): "
    "seen where their gradients are opposite.",
    "batch_sizes_vary_as_those_of_poisson_samples_do",
    core=sampling.truncated,
)
_fault(
    "same-batch-every-step",
    "one sample serves all steps",
    MORE_THAN_A_HUNDRED,
    "with probability q an example is in all 1000 steps, which is a noise of σ / √1000.",
    "batches_are_independent_of_each_other",
    core=sampling.once_for_all_steps,
)

# ----------------------------------------------------------------------------------------- accounting

_fault(
    "fewer-steps-accounted",
    "the accountant is told a tenth of the steps, rounded up",
    3.1,
    "ε of ten times the steps, by PLD; nothing for a single step.",
    "the_stated_epsilon_is_that_of_the_noise_and_the_steps",
    core=sampling.fewer_steps,
)
_fault(
    "larger-noise-accounted",
    "the accountant is told twice the noise multiplier",
    9.1,
    "the cost of σ/2, by PLD.",
    "the_stated_epsilon_is_that_of_the_noise_and_the_steps",
    core=sampling.larger_noise,
)
_fault(
    "wrong-neighbours-accounted",
    "what is accounted for replace-one is the cost of add-or-remove-one",
    1.3,
    "by PLD; 2.3 for one step at q = 1. Nothing for a mechanism of add-or-remove-one.",
    "replacing_an_example_costs_what_twice_the_sensitivity_does",
    core=sampling.wrong_neighbours,
)

# ------------------------------------------------------------------------------------------- clipping

BOTH = ENGINES

_fault(
    "twice-the-clip-norm",
    "gradients are clipped to 2 C, the noise is for C",
    9.1,
    "the cost of σ/2, by PLD.",
    "no_example_moves_the_sum_by_more_than_the_clip_norm",
    clipping=BOTH,
)
_fault(
    "factors-in-bfloat16",
    "clip factors are rounded to bfloat16",
    1.01,
    "an example's part reaches 1.004 C.",
    "no_example_moves_the_sum_by_more_than_the_clip_norm",
    clipping=BOTH,
)
_fault(
    "norm-without-a-layer",
    "a matrix is clipped with the rest, but its part of the norm is left out",
    math.inf,
    "a gradient that lies in that matrix alone is not clipped at all.",
    "no_example_moves_the_sum_by_more_than_the_clip_norm",
    clipping=BOTH,
)
_fault(
    "norm-without-cross-terms",
    "of a parameter that is used several times, the norms of the uses are added and not their gradients",
    2.9,
    "two equal gradients make √2 C, k of them √k C; 1.5 for one step at q = 1. Only models with such a "
    "parameter show it.",
    "no_example_moves_the_sum_by_more_than_the_clip_norm",
    clipping=BOTH,
)
_fault(
    "clipped-by-layer",
    "each parameter's gradient is clipped to C by itself",
    MORE_THAN_A_HUNDRED,
    "the sensitivity is √K C with K parameters, of which there are dozens.",
    "no_example_moves_the_sum_by_more_than_the_clip_norm",
    clipping=BOTH,
)
_fault(
    "clipped-as-a-group",
    "the mean gradient of a physical batch is clipped and counted for each of its examples",
    MORE_THAN_A_HUNDRED,
    "one large gradient turns the whole batch of P examples around: 2 P C.",
    "no_example_moves_the_sum_by_more_than_the_clip_norm",
    clipping=BOTH,
)
_fault(
    "nan-spreads",
    "an example whose gradient is not finite makes the sum NaN",
    math.inf,
    "NaN in the release says that such an example was sampled.",
    "examples_without_a_finite_gradient_contribute_nothing_and_the_others_all",
    clipping=BOTH,
)
_fault(
    "mask-ignored",
    "rows that fill a physical batch up are counted",
    MORE_THAN_A_HUNDRED,
    "they hold example 0, which counts up to P times whether it was drawn or not; others are as they should "
    "be, except that they move the number of rows.",
    "a_release_is_the_sum_of_the_clipped_gradients_of_its_batch_over_the_public_size",
    clipping=BOTH,
)
_fault(
    "forgets-earlier-parts",
    "only the last physical batch of a logical one is released",
    MORE_THAN_A_HUNDRED,
    "one example more begins another physical batch, so that P others are left out: seen where batches are "
    "full and gradients alike.",
    "examples_without_a_finite_gradient_contribute_nothing_and_the_others_all",
    clipping=BOTH,
)
_fault(
    "counts-the-first-part-twice",
    "the first physical batch of a logical one counts twice",
    9.1,
    "its examples add 2 C.",
    "a_release_is_the_sum_of_the_clipped_gradients_of_its_batch_over_the_public_size",
    clipping=BOTH,
)
_fault(
    "mixing-is-not-seen",
    "the probe accepts models in which one example moves another's gradient",
    math.inf,
    "one example can turn all others of its physical batch around; only such models show it.",
    "a_model_that_mixes_examples_is_refused",
    clipping=("torch",),
)
_fault(
    "anything-is-released",
    "sums that were not clipped, or to another norm than the mechanism's, are released",
    math.inf,
    "nothing bounds what an example adds; only code that passes such a sum shows it.",
    "a_sum_clipped_otherwise_is_not_released",
    door=noise.anything_is_released,
)
