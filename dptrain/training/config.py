"""Everything that defines a run, as flat data that a file or flags can state."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dptrain.core.checks import shown
from dptrain.core.files import Unreadable, parse_json, read_text

OptimizerName = Literal[
    "sgd",
    "momentum",
    "nesterov",
    "adagrad",
    "rmsprop",
    "adam",
    "adamw",
    "adam-bc",
    "adamw-bc",
    "accumulated-momentum",
    "running-momentum",
]
ScheduleName = Literal["constant", "linear", "cosine"]
PrecisionName = Literal["fp32", "tf32", "bf16"]
NormalizationName = Literal["auto", "half", "imagenet", "none"]
AccountantName = Literal["pld", "rdp"]
EngineName = Literal["torch", "jax"]
FeaturesName = Literal["none", "scattering"]
RestartName = Literal["afresh", "replay"]
ShardName = Literal["none", "optimizer"]
ClipRuleName = Literal["flat", "automatic", "per-layer", "quantile"]
AugmentationName = Literal["shift", "shift-flip"]
CompressName = Literal[
    "none",
    "topk",
    "global-topk",
    "random-k",
    "public-topk",
    "public-global-topk",
    "public-subspace",
    "leaky-topk-no-guarantee",
]

PUBLIC_GRADIENT = ("public-topk", "public-global-topk")
PUBLIC_SUBSPACE, RANDOM, LEAKY = "public-subspace", "random-k", "leaky-topk-no-guarantee"
KNOWN_BEFORE = (*PUBLIC_GRADIENT, PUBLIC_SUBSPACE, RANDOM)
"""Ways to compress that no private example decides."""


PATHS = ("data_dir", "weights", "out", "keep_features")
MACHINE_SETTINGS = frozenset(
    {
        "data_dir",
        "download",
        "keep_features",
        "workers",
        "device",
        "devices",
        "out",
        "tensorboard",
        "show_unprotected",
        "restart",
        "checkpoint_every",
        "shard",
    }
)
"""What may differ when a run is resumed: where it runs and what it tells, not what it computes."""
ALTERNATIVES = (("epsilon", "noise_multiplier"), ("epochs", "steps"))
"""Pairs of settings of which exactly one is given."""


class ConfigError(ValueError):
    """A run cannot be done as asked. The message says what was wrong and what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults train on scikit-learn's digits in seconds.

    Those of the optimisation were chosen on a validation split of the training digits.
    """

    # Data
    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, an image folder with train/ and test/,
    hf:NAME[:CONFIGURATION] or hf:PATH: texts or images that the library datasets reads, or shards:PATH:
    a folder of safetensors, Arrow or Parquet files of any size, read by index (docs/large-data.md)."""
    data_dir: Path | None = None
    """Where data sets lie; by default the environment variable DPTRAIN_DATA, else ./data."""
    download: bool = False
    """Fetch the data set into the data directory if it is not there."""
    image_size: int | None = None
    """Pixels per side; by default what a timm model was made for, else as stored."""
    normalization: NormalizationName = "auto"
    """auto: what the model was made for, else half; half: to [-1, 1]; none: to [0, 1]."""
    features: FeaturesName = "none"
    """scattering: give the model fixed wavelet coefficients in place of the images, computed once; no data
    shaped them, so they cost no privacy (docs/accuracy.md; needs dptrain[scattering])."""
    workers: int | None = None
    """Processes that decode an image folder ahead, or threads that read shards: ahead; by default one per
    core, up to 8."""
    validation_fraction: float = 0.0
    """Part of the training set to hold out and evaluate on, in place of the test set."""
    text_column: str | None = None
    """Of hf: data, the column of texts, or two for pairs (A,B); by default the only one there is."""
    label_column: str | None = None
    """Of hf: and shards: data, the column of labels; by default the only one with classes, or label."""
    tokenizer: str | None = None
    """A tokenizer on the hub or in a folder; by default the model's own."""
    max_length: int | None = None
    """Tokens per text; longer ones are cut, shorter ones padded. By default 128 if the model can."""

    # Model
    model: str = "convnet"
    """A small network, vit-tiny to -huge, bit-50x1 to -152x4, a timm name, hf:NAME or hf:PATH (a
    classifier of transformers), or package:factory."""
    pretrained: bool = False
    """Load the pre-trained weights of a timm or hf: model from its hub or folder."""
    weights: Path | None = None
    """Load weights from this safetensors file, looked for where you are and then under --data-dir."""
    trainable: str = "all"
    """all; head; bias (biases, head); norm (normalisation, head); lora (low-rank adapters on the
    linear layers of all blocks, head); or a regular expression."""
    lora_rank: int = 8
    """With --trainable lora: rank of the adapters."""
    lora_alpha: float = 16.0
    """With --trainable lora: the adapters are scaled by this over their rank."""
    convert: bool = False
    """Replace BatchNorm, which mixes examples, by GroupNorm; running statistics are lost."""
    frozen_blocks: int = 0
    """Leave the first so many blocks of a timm model, and what is before them, as they are, whatever
    --trainable says."""
    cache_features: bool = False
    """With --trainable head or --frozen-blocks: run what is frozen once per example, and train on its
    features."""
    keep_features: Path | None = None
    """Keep the features of --features and --cache-features in this folder, for the next run of the same
    images and backbone. They say as much of private images as these do: keep them in as safe a place."""

    # Privacy
    epsilon: float | None = 8.0
    """The budget: the noise is calibrated to it. Give this or --noise-multiplier."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise, in clip norms. Give this or --epsilon."""
    delta: float = 1e-4
    """The other half of the budget; well below 1 / (number of training examples)."""
    accountant: AccountantName = "pld"
    """pld: tight; rdp: for comparison with older work."""
    clip_norm: float = 0.5
    """Each example's gradient is scaled down to at most this L2 norm."""
    clip_rule: ClipRuleName = "flat"
    """flat: as a whole; automatic: all are normalised to the clip norm, small ones too; per-layer: each layer
    to its share of it; quantile: it only begins there and follows a quantile of the norms, whose noisy
    estimates are part of the budget."""
    clip_quantile: float = 0.5
    """With --clip-rule quantile: the share of examples that shall not be clipped."""
    noise_ramp: float = 1.0
    """The noise multiplier of the last steps over that of the first; it changes in eight pieces, and so do
    the next two. The budget holds for all steps together."""
    noise_bands: int = 1
    """Over how many steps the noise is correlated, so that it cancels in part (DP-FTRL, banded matrix
    factorisation). Each example then takes part in every so-manieth step at most, and more often there."""
    clip_ramp: float = 1.0
    """The clip norm of the last steps over that of the first."""
    batch_ramp: float = 1.0
    """The expected batch size, and with it the sample rate, of the last steps over that of the first."""
    method: str = "auto"
    """How per-example gradients are clipped; non-private turns clipping and noise off."""
    hardened: bool = False
    """Sum on an integer grid and add exactly sampled rounded noise (docs/noise.md): nothing of floating point
    is left between clipping and noise. Methods that keep the gradient of each example, PyTorch engine."""
    dataset_name: str | None = None
    """The name under which the ledger adds up what is released from the same data; by default --data."""
    restart: RestartName = "afresh"
    """Steps that were lost when a run died are repeated: afresh: with new randomness, paid for again, so
    that the run ends earlier; replay: bit for bit, from a key kept in a file outside the run folder."""
    seed: int | None = None
    """Absent: all randomness from the operating system. Present: the run is marked reproducible."""

    # Optimisation
    logical_batch_size: float = 512.0
    """Expected number of examples per step (L); each is drawn with probability L / N."""
    max_logical_batch_size: int | None = None
    """At most so many examples per step: of a larger sample a random part is left out (truncated Poisson
    sampling, accounted as such). Neighbouring data sets then differ in what one example is, not in size."""
    physical_batch_size: Annotated[int | Literal["auto"], tyro.conf.arg(metavar="INT|auto")] = "auto"
    """Examples computed at once; auto: the smallest within 3 % of the best throughput that fits."""
    epochs: float | None = None
    """Expected passes over the data. Give this or --steps."""
    steps: int | None = 150
    """Optimizer steps. Give this or --epochs."""
    lr: float = 0.6
    """Learning rate."""
    augmentations: int = 0
    """So many random views of each image, whose gradients are averaged before clipping; 0: the image."""
    augmentation: AugmentationName = "shift-flip"
    """What a view is: shifted by up to an eighth, also mirrored left and right or not."""
    lr_schedule: ScheduleName = "constant"
    """How the learning rate changes over the run."""
    optimizer: OptimizerName = "momentum"
    """momentum and nesterov are SGD with momentum 0.9; adam-bc and adamw-bc take the noise's variance off the
    second moment; docs/optimizers.md has them all."""
    adam_floor: float = 0.1
    """With adam-bc and adamw-bc: the second moment is at least this times the noise's variance."""
    denoise: float = 0.0
    """Gain of a Kalman filter over the private gradients (DiSK, docs/optimizers.md), below 1: what one step
    counts for; 0: none. Gradients are taken ahead of the weights, and privacy costs the same."""
    weight_decay: float = 0.0
    """As torch's optimizers apply it."""
    weight_average: float = 0.95
    """Decay of an exponential average of the weights, which is then what is saved; 0: none."""

    # Compression (docs/compression.md)
    compress: CompressName = "none"
    """What is kept of each gradient. topk, global-topk: the largest magnitudes of the noisy gradient, of each
    tensor or of all; random-k; public-topk, public-global-topk: those of a gradient of public examples;
    public-subspace: the part in the span of public gradients; leaky-topk-no-guarantee: those of the private
    gradient itself: NO privacy, epsilon = inf."""
    keep: float = 0.01
    """With --compress: the share of coordinates that are kept."""
    subspace_rank: int = 8
    """With --compress public-subspace: dimensions that are kept of each tensor."""
    compress_before_clipping: bool = False
    """With random-k and public-...: project each example's gradient before it is clipped, so that clipping
    and noise are spent on what is kept alone; else only the noisy gradient is projected."""
    error_feedback: bool = False
    """Add what compression left out to the next gradient."""
    public_examples: int = 0
    """So many random training examples that YOU declare public: they are held out of the private ones, have
    no part in N, q and L, and epsilon says nothing of them."""

    # Machine
    engine: EngineName = "torch"
    """torch or jax. JAX has the small networks, ViT and BiT, and compiles once for the run."""
    device: str = "auto"
    """cuda, cpu, ..., or auto: a GPU if there is one."""
    devices: int = 1
    """With --engine jax: on how many devices to train, each with physical batches of its own."""
    precision: PrecisionName = "fp32"
    """Compute type; norms, sums and noise are float32 in any case."""
    compile: bool = False
    """One compiled graph for the whole private step; a model for which there is none runs uncompiled."""
    shard: ShardName = "none"
    """Under torchrun, what the ranks share out: optimizer: its state, of which each keeps a part (ZeRO-1)."""

    # Output
    out: Path | None = None
    """Run folder; by default runs/ and a name made of data, model and time."""
    evaluations: int = 10
    """How often to evaluate over the run."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; by default as often as costs 2 % of the time, at least every 5 minutes."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    show_unprotected: bool = False
    """Also show training loss, gradient norms and batch sizes, which epsilon does NOT cover."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` undoes it."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """A configuration from file contents over the defaults; unknown keys are refused."""
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ConfigError(
                f"The configuration has no setting {shown(unknown[0])}; see `dptrain train --help`."
            )
        typed = {name: Path(v) if name in PATHS and isinstance(v, str) else v for name, v in values.items()}
        return replace(cls().without_rivals_of(values), **typed)

    def without_rivals_of(self, given: Collection[str]) -> TrainConfig:
        """This configuration less the settings that those in `given` stand in for.

        Whoever states --noise-multiplier does not want the default --epsilon as well.
        """
        dropped: dict[str, Any] = {}
        for pair in ALTERNATIVES:
            for mine, other in (pair, pair[::-1]):
                if other in given and mine not in given:
                    dropped[mine] = None
        return replace(self, **dropped)

    def check(self) -> None:
        """Raise ConfigError for what no data set or model could make sense of."""
        from dptrain.training.config_check import check

        check(self)


def read_config(path: Path) -> TrainConfig:
    """A configuration from a .json or .toml file."""
    if not os.path.exists(path):
        raise ConfigError(f"There is no configuration file {path}; check --config.")
    try:
        text = read_text(path)
        values = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)
    except Unreadable as error:
        raise ConfigError(f"{path} {error}; mend or choose another --config.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML ({error}); mend it.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a table of settings.")
    try:
        return TrainConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
