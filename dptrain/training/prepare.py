"""From a configuration to everything a run needs; all that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dptrain import torch as dpt
from dptrain.core import methods
from dptrain.core.accounting import REPLACE_SPECIAL
from dptrain.core.budget import steps_in
from dptrain.core.clip_rules import Automatic, ClipRule, Flat, PerLayer, Quantile
from dptrain.core.correlated import correlated
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.ramps import ramped
from dptrain.core.spec import TRUNCATED_POISSON
from dptrain.data import (
    Columns,
    DataError,
    Dataset,
    FeatureStore,
    Preprocess,
    Splits,
    Tokenization,
    digest_of_weights,
    load,
    scattered,
    stratified,
)
from dptrain.models import (
    Backbone,
    Preferences,
    Trainable,
    WeightReport,
    in_head,
    preferences,
    select_trainable,
    split_blocks,
    split_head,
)
from dptrain.training.config import LEAKY, ConfigError, TrainConfig
from dptrain.training.device import check_precision, resolve_device
from dptrain.training.make_model import Made, frozen, make_model
from dptrain.training.saved import Tensors, restore_fixed

COUNT_NOISE = 0.05
"""Of `quantile` clipping: noise on the count, as a share of the expected batch size (Andrew et al. 2021)."""

VALIDATION_SEED = 1
"""The split of --validation-fraction is public and the same in every run."""

PUBLIC_SEED = 2
"""So is the choice of --public-examples, which looks at no example."""

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0,), (1.0,)),
}
"""Public constants: (means, standard deviations) per channel."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to start: nothing of the budget is spent yet."""

    config: TrainConfig
    train: Dataset
    """Private examples."""
    held_out: Dataset
    """Examples for evaluation: the test set, or the held-out part of the training set."""
    held_out_name: str
    model: nn.Module
    """The whole model, as it is saved."""
    learner: nn.Module
    """The part that reads `train` and is trained: the model, or its head if features are cached."""
    trainable: Trainable
    weights: WeightReport | None
    conversion: dpt.ConversionReport | None
    mechanism: Mechanism
    method: str
    device: torch.device
    key: Key
    public: Dataset | None = None
    """Training examples that the user has declared public."""
    in_vain: Mechanism | None = None
    """Of a compression without any guarantee: the noise that protects nothing. `mechanism` has none."""

    @property
    def is_private(self) -> bool:
        """Whether gradients are clipped and get noise."""
        return methods.resolve(self.method).is_private

    @property
    def has_guarantee(self) -> bool:
        """Whether epsilon is finite."""
        return self.is_private and self.in_vain is None


def prepare(config: TrainConfig, fixed: Tensors | None = None, key: Key | None = None) -> Run:
    """Load, build, select, calibrate.

    fixed: frozen weights of the run that is to go on, taken in place of pre-trained ones. key: the run's, if
    it has one already.

    Raises ConfigError, DataError or ModelError (all ValueErrors of one sentence).
    """
    config.check()
    method = methods.resolve(config.method)
    # For JAX the PyTorch model, which owns the weights before and after, stays on the CPU with the data.
    device = resolve_device(config.device if config.engine == "torch" else "cpu")
    if config.engine == "torch":
        check_precision(config.precision, device)
    key = key or (Key.from_entropy() if config.seed is None else Key.from_seed(config.seed))

    wanted = preferences(config.model)
    splits = load_splits(config, wanted, device)
    mechanism, in_vain = make_mechanism(config, len(splits.train), private=method.is_private), None
    if config.compress == LEAKY:
        mechanism, in_vain = without_noise(mechanism), mechanism

    # All that a saved run had loaded is in its own files.
    plain = config if fixed is None else replace(config, pretrained=False, weights=None)
    made = _initialised(plain, splits, key)
    model = made.model.to(device)
    trainable = select_trainable(model, config.trainable, frozen(config, model))
    if fixed is not None:
        restore_fixed(model, fixed)
    made_features = config.cache_features or config.features != "none"
    if config.augmentations and (made_features or len(splits.train.input_shape) != 3):
        raise ConfigError(
            "--augmentations makes views of images, which features and texts are not: leave it out."
        )
    learner = model
    if config.cache_features:
        backbone, learner = _split(config, model, splits)
        store, made_by = FeatureStore(config.keep_features), _backbone_identity(config, model)
        parts = (splits.train, splits.test, splits.public)
        train, test, public = (part and store.features(part, backbone, made_by) for part in parts)
        splits = replace(splits, train=train, test=test, public=public)
        if list(learner(splits.train.stand_in(1)[0]).shape) != [1, splits.num_classes]:
            raise ConfigError(
                f"--cache-features needs a head that reads one vector per example; that of {config.model} "
                "reads more: leave it out."
            )
    return Run(
        config=replace(config, method=method.name),
        train=splits.train,
        held_out=splits.test,
        held_out_name=splits.test_name,
        model=model,
        learner=learner,
        trainable=trainable,
        weights=made.weights,
        conversion=made.conversion,
        mechanism=_by_layer(config, mechanism, learner),
        method=method.name,
        device=device,
        key=key,
        public=splits.public,
        in_vain=in_vain,
    )


def load_splits(config: TrainConfig, wanted: Preferences, device: torch.device) -> Splits:
    """The training examples and those to evaluate on, preprocessed as the model wants them."""
    mean, std = (
        (wanted.mean, wanted.std) if config.normalization == "auto" else NORMALIZATIONS[config.normalization]
    )
    preprocess = Preprocess(config.image_size or wanted.image_size, mean, std, wanted.interpolation)
    splits = load(
        config.data,
        config.data_dir,
        preprocess,
        device,
        config.download,
        config.workers,
        Columns(config.text_column, config.label_column),
        Tokenization(config.tokenizer or wanted.tokenizer, config.max_length, wanted.max_length),
    )
    if config.features == "scattering":
        splits = scattered(splits, FeatureStore(config.keep_features), device)
    if config.validation_fraction:
        rest, held_out = stratified(splits.train.labels, config.validation_fraction, VALIDATION_SEED)
        splits = Splits(splits.train.subset(rest), splits.train.subset(held_out), "validation")
    if splits.test is None:
        raise DataError(
            f"{config.data} has no examples with labels to evaluate on; hold a part of the training set "
            "out with --validation-fraction 0.1."
        )
    return declare_public(splits, config.public_examples) if config.public_examples else splits


def declare_public(splits: Splits, count: int) -> Splits:
    """With `count` random training examples apart, the same in every run: public from here on.

    Raises:
        ConfigError: there are not so many.
    """
    size = len(splits.train)
    if count >= size:
        raise ConfigError(f"--public-examples is {count}, but there are {size:,} training examples.")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(PUBLIC_SEED))
    rest, public = order[count:].sort().values, order[:count].sort().values
    return replace(splits, train=splits.train.subset(rest), public=splits.train.subset(public))


def make_mechanism(config: TrainConfig, dataset_size: int, private: bool) -> Mechanism:
    """The mechanism that the configuration asks for, on `dataset_size` training examples."""
    expected = config.logical_batch_size
    if expected > dataset_size:
        raise ConfigError(
            f"--logical-batch-size is {expected:g}, but there are {dataset_size:,} training "
            "examples; "
            "it can be at most that."
        )
    sample_rate = expected / dataset_size
    steps = config.steps if config.steps is not None else steps_in(config.epochs or 0, sample_rate)
    constants: dict[str, Any] = {
        "clip_norm": _clip_rule(config),
        "sample_rate": sample_rate,
        "steps": steps,
        "expected_batch_size": expected,
        "delta": config.delta,
    }
    if config.max_logical_batch_size is not None:
        constants["sampler"] = TRUNCATED_POISSON
        constants["max_batch_size"] = config.max_logical_batch_size
        constants["dataset_size"] = dataset_size
        constants["neighbours"] = REPLACE_SPECIAL  # it is not accounted for data sets of different sizes
    if config.noise_bands > 1 and private:
        return _correlated(config, constants)
    ramps = {"noise": config.noise_ramp, "clip": config.clip_ramp, "batch": config.batch_ramp}
    if set(ramps.values()) != {1.0}:
        return _ramped(config, constants, ramps, private)
    if not private:
        return Mechanism.constant(noise_multiplier=0.0, **constants)
    if config.noise_multiplier is not None:
        mechanism = Mechanism.constant(noise_multiplier=config.noise_multiplier, **constants)
    else:
        mechanism = Mechanism.calibrate(epsilon=config.epsilon, accountant=config.accountant, **constants)
    return mechanism.hardened() if config.hardened else mechanism


def _ramped(
    config: TrainConfig, constants: dict[str, Any], ramps: dict[str, float], private: bool
) -> Mechanism:
    """A mechanism that changes over the run."""
    sigma = config.noise_multiplier or 1.0 if private else 0.0
    first = Mechanism.constant(noise_multiplier=sigma, **constants)
    mechanism = ramped(
        first.step(0),
        first.steps,
        delta=config.delta,
        epsilon=config.epsilon if private else None,
        accountant=config.accountant,
        neighbours=first.neighbours,
        **ramps,
    )
    return mechanism.hardened() if config.hardened and private else mechanism


def _correlated(config: TrainConfig, constants: dict[str, Any]) -> Mechanism:
    """A mechanism whose noise is correlated over --noise-bands steps."""
    return correlated(
        bands=config.noise_bands,
        epsilon=config.epsilon,
        noise_multiplier=config.noise_multiplier,
        accountant=config.accountant,
        **constants,
    )


def _clip_rule(config: TrainConfig) -> ClipRule:
    """The rule that the mechanism is made with; `per-layer` takes its place when the layers are known."""
    match config.clip_rule:
        case "automatic":
            return Automatic(config.clip_norm)
        case "quantile":
            count_noise = config.logical_batch_size * COUNT_NOISE
            return Quantile(config.clip_norm, count_noise, config.clip_quantile)
        case _:
            return Flat(config.clip_norm)


def _by_layer(config: TrainConfig, mechanism: Mechanism, learner: nn.Module) -> Mechanism:
    """Each layer clipped to its share of the clip norm, which leaves sensitivity and epsilon as they are."""
    if config.clip_rule != "per-layer":
        return mechanism
    names = [name for name, p in learner.named_parameters() if p.requires_grad]
    return mechanism.with_rule(PerLayer.evenly(config.clip_norm, names))


def without_noise(mechanism: Mechanism) -> Mechanism:
    """The same steps without noise, hence without any guarantee."""
    segments = tuple((replace(spec, noise_multiplier=0.0), n) for spec, n in mechanism.segments)
    return Mechanism(segments, mechanism.neighbours, mechanism.delta)


def _split(config: TrainConfig, model: nn.Module, splits: Splits) -> tuple[Backbone, nn.Module]:
    """What is run once per example, and what is trained on its features."""
    if not config.frozen_blocks:
        return split_head(model)
    example = splits.train.stand_in(1)[0]
    if not isinstance(example, torch.Tensor):
        raise ConfigError("--frozen-blocks is for models of images: leave it out.")
    return split_blocks(model, config.frozen_blocks, example)


def _backbone_identity(config: TrainConfig, model: nn.Module) -> str:
    """What features depend on besides their inputs."""
    is_head, is_frozen, blocks = in_head(model), frozen(config, model), config.frozen_blocks
    state = model.state_dict().items()
    kept = {key: tensor for key, tensor in state if (is_frozen(key) if blocks else not is_head(key))}
    cut = f" behind {blocks} blocks" if blocks else ""
    return f"{config.model}{cut} {digest_of_weights(kept)}"


def _initialised(config: TrainConfig, splits: Splits, key: Key) -> Made:
    """The model, initialised from the run's key; global random state is left as found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key.child("initialisation").seed64())
        return make_model(config, splits)
