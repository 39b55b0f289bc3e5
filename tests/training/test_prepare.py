import pytest

from dptrain.training import ConfigError, prepare


def test_epochs_become_steps_by_the_sample_rate(quick):
    run = prepare(quick(epochs=3))
    assert run.mechanism.steps == round(3 * len(run.train) / 200)
    assert run.mechanism.sample_rate == pytest.approx(200 / len(run.train))
    assert run.mechanism.expected_batch_size == 200


def test_noise_is_calibrated_to_epsilon(quick):
    mechanism = prepare(quick(epsilon=3.0)).mechanism
    assert 2.9 < mechanism.epsilon() <= 3.0


def test_a_validation_part_leaves_the_test_set_unread(quick):
    whole, part = prepare(quick()), prepare(quick(validation_fraction=0.25))
    assert len(part.train) + len(part.held_out) == len(whole.train)
    assert part.held_out_name == "validation"
    assert whole.held_out_name == "test"


def test_a_batch_larger_than_the_data_is_refused(quick):
    with pytest.raises(ConfigError, match="can be at most that"):
        prepare(quick(logical_batch_size=5000))


def test_a_largest_batch_is_drawn_and_accounted_as_truncated_poisson(quick):
    settings = {"noise_multiplier": 4.0, "steps": 1, "evaluations": 1}
    plain, cut = (prepare(quick(max_logical_batch_size=most, **settings)).mechanism for most in (None, 200))
    sampling = cut.step(0).sampling
    assert (sampling.sampler, sampling.max_batch_size, sampling.dataset_size) == (
        "truncated-poisson",
        200,
        1438,
    )
    assert (plain.neighbours, cut.neighbours) == ("add-or-remove-one", "replace-special")
    assert cut.epsilon() > 1.3 * plain.epsilon()  # every second sample is cut
    assert cut.describe()["largest batch size"] == "200"


@pytest.mark.slow
def test_noise_is_calibrated_to_epsilon_for_a_largest_batch(quick):
    plain, rarely, often = (
        prepare(quick(epsilon=3.0, max_logical_batch_size=most)).mechanism for most in (None, 300, 200)
    )
    assert 2.9 < often.epsilon() <= 3.0
    assert rarely.noise_multiplier == pytest.approx(plain.noise_multiplier, rel=1e-3)
    assert often.noise_multiplier > 1.3 * plain.noise_multiplier


def test_a_seed_fixes_the_initial_weights_and_its_absence_does_not(quick):
    def weights(**changes):
        return prepare(quick(**changes)).model.head.weight

    assert (weights() == weights()).all()
    assert (weights() != weights(seed=2)).any()
    assert (weights(seed=None) != weights(seed=None)).any()


def test_the_non_private_method_has_no_noise(quick):
    run = prepare(quick(method="public"))
    assert (run.method, run.is_private) == ("non-private", False)
    assert run.mechanism.epsilon() == float("inf")


def test_tf32_needs_a_gpu_that_has_it(quick):
    with pytest.raises(ConfigError, match="tf32 needs"):
        prepare(quick(precision="tf32", device="cpu"))
