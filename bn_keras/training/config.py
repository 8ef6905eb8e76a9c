"""The config schema: every setting with its default and meaning, and the check of their values.

The defaults are the paper's Inception on ImageNet. `networks.py` derives the other networks from
it, and each file in configs/ is one experiment. Values that the paper leaves open name their
source.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bn_keras.data.accepted_settings import check_settings
from bn_keras.distribute import check_strategy
from bn_keras.errors import UsageError
from bn_keras.runs.settings import flatten
from bn_keras.text import first_of


def default_config() -> ConfigDict:
    """Returns the schema with its defaults, locked: a key that is not here is an error."""
    config = ConfigDict()

    # Seed of everything random: weights, example order, distortions, dropout.
    config.seed = 0

    config.data = ConfigDict()
    # "digits" (part of scikit-learn), "synthetic", "folder" for your own images, or the name of an
    # image classification set in TFDS: "mnist", "cifar10", "imagenet2012", ...
    config.data.name = "imagenet2012"
    # Folder of prepared TFDS sets; "" is TFDS's default, ~/tensorflow_datasets. For "folder", the
    # folder with SPLIT/CLASS/IMAGE. A relative path is saved as an absolute one.
    config.data.data_dir = ""
    # Training examples, in TFDS syntax, such as "train[:90%]". "folder" accepts percentages, taken
    # of each class, and ".[:90%]" where data_dir holds CLASS/IMAGE.
    config.data.train_split = "train"
    # Validation examples, in the same syntax, such as "train[90%:]" or ".[90%:]".
    config.data.validation_split = "validation"
    # Side of the network's square input, in pixels; 0 keeps the size of the images.
    config.data.image_size = 224
    # "inception": area 8-100%, aspect ratio 3/4-4/3, resized (GoogLeNet). "shift": by up to an
    # eighth of the side, padded with mean grey. "none": the whole image.
    config.data.crop = "inception"
    # Mirror left to right with probability 1/2.
    config.data.mirror = True
    # Strength of the photometric distortions, from 0 (none) to 1 (full).
    config.data.distortion = 1.0
    # Magnitude of RandAugment (keras-cv), from 0 (none) to 1. Not in the paper.
    config.data.random_augment = 0.0
    # MixUp: alpha of the Beta distribution of the shares; 0 turns it off. Images are mixed in
    # pairs: each replica needs an even number.
    config.data.mixup = 0.0
    # CutMix: alpha of the Beta distribution of the areas; 0 turns it off. Pairs as for MixUp; with
    # both on, they alternate by batch.
    config.data.cutmix = 0.0
    # Threshold pixels at one half to 0 and 1 (section 4.1) instead of scaling them to [-1, 1].
    config.data.binary = False
    # "examples": shuffle within shards; "shards": change only the order of the shards. Data in
    # memory is one shard; the images of a folder are always shuffled one by one.
    config.data.shuffle = "shards"
    # Unreadable images accepted per split and process. Each is named in the log; training replaces
    # it, evaluation leaves it out.
    config.data.max_bad_examples = 0
    # Classes of unequal size: "weights" in the loss, inverse to the number of training images of
    # each class; "sampling" draws all classes equally often; "none".
    config.data.balance = "none"

    config.model = ConfigDict()
    # "inception" (Figure 5) or "mlp" (section 4.1).
    config.model.name = "inception"
    # inception: "inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid", the ensemble's
    # "bn_x30_ensemble_1" to "bn_x30_ensemble_6", "inception_sigmoid". mlp: "baseline", "bn".
    config.model.variant = "inception"
    # Origin of the open details (projections, stem, padding, biases): "paper", "slim" (TF-Slim) or
    # "caffe" (the PyTorch ports).
    config.model.preset = "paper"
    # Channels projected after the pools of 4c and 4d; 0 is the preset's value.
    config.model.pool_projection = 0
    # Factor on every number of channels.
    config.model.width = 1.0
    # "imagenet": 7x7 separable with stride 2, pool, 3x3, pool. "cifar": 3x3 with stride 2, no
    # pools. "digits": 3x3 with stride 1, no pools.
    config.model.stem = "imagenet"
    # Modules of Figure 5 that are built, such as ("3a", "3c", "5b"); () builds all ten.
    config.model.modules = ()
    # Keras initializer of all kernels, or "normal" with initializer_stddev.
    config.model.initializer = "he_normal"
    # Standard deviation of the kernels with initializer "normal"; other initializers ignore it.
    config.model.initializer_stddev = 0.01
    # The next four are None by default, which means the variant's own value. A value given here
    # takes precedence over the variant.

    # Factor on the initial weights of the convolutions.
    config.model.initializer_scale = placeholder(float)
    # Fraction of the activations dropped before the classifier in training.
    config.model.dropout = placeholder(float)
    # Local response normalization in the stem.
    config.model.local_response_normalization = placeholder(bool)
    # BN in module 5b per activation instead of per feature map.
    config.model.per_activation_bn = placeholder(bool)
    # Weight of the loss of an auxiliary classifier on module 4d, built for training only; 0 leaves
    # it out. Inception-v3 uses 0.4.
    config.model.auxiliary_weight = 0.0
    # Fine-tuning: initial weights from the workdir of another run (its best network), or from a
    # .keras or .weights.h5 file, such as the output of `bn-keras convert`. The head is new where
    # its classes differ. "" draws all weights from the seed.
    config.model.init_from = ""
    # Layers that keep their initial weights, with their BN in inference mode: "none"; all layers up
    # to "stem", to a module such as "4e", or to a hidden layer of the mlp such as "2"; or
    # "all_but_head".
    config.model.freeze = "none"

    config.batch_norm = ConfigDict()
    # Fraction of the moving statistics kept at each step (TF-Slim's value).
    config.batch_norm.momentum = 0.9997
    # Added to the variance under the root; 0 is the preset's value: 1e-3 (TF-Slim), "caffe" 1e-5.
    config.batch_norm.epsilon = 0.0
    # Compute batch statistics over all replicas instead of per replica.
    config.batch_norm.synchronized = False
    # Examples per ghost batch, each normalized by its own statistics; a divisor of each replica's
    # batch size. 0 normalizes a replica's whole batch.
    config.batch_norm.virtual_batch_size = 0

    config.train = ConfigDict()
    # Length in steps: 774 epochs.
    config.train.steps = 31_000_000
    # Length in epochs instead, rounded up to whole steps; 0 uses train.steps. On the command line,
    # --config.train.steps replaces it.
    config.train.epochs = 0.0
    # Training examples per step, over all replicas.
    config.train.global_batch_size = 32
    # Momentum of SGD (GoogLeNet).
    config.train.momentum = 0.9
    # Weight of the L2 penalty l2/2 * |w|^2 on kernels (TF-Slim's value).
    config.train.l2 = 4e-5
    # Share of each label that is spread over all classes.
    config.train.label_smoothing = 0.0
    # Gradient accumulation: micro-batches per global batch, for batches that do not fit into
    # memory. BN normalizes each micro-batch on its own.
    config.train.micro_batches = 1
    # Fraction kept at each step by the exponential moving average (EMA) of the weights; 0 keeps no
    # EMA. It is evaluated wherever population statistics are, and always in a network without BN.
    config.train.ema = 0.0
    # Stop at the first evaluation that reaches this accuracy, a fraction; 0 trains for all steps.
    config.train.until_accuracy = 0.0
    # Early stopping: stop after this many evaluations without a higher accuracy than before; 0
    # trains for all steps.
    config.train.patience = 0
    # How many times a diverged run is rolled back to its last checkpoint, each time with a lower
    # learning rate.
    config.train.retries = 0
    # Factor on the learning rate at each rollback of a diverged run.
    config.train.retry_factor = 0.5
    # Keras dtype policy: "float32", "mixed_bfloat16", or "mixed_float16" with dynamic loss scaling.
    config.train.precision = "float32"
    # Steps that run on the device between two checks of the loss; each such loop writes one line of
    # metrics.
    config.train.steps_per_loop = 500

    config.schedule = ConfigDict()
    # Learning rate at reference_batch_size; it scales linearly with train.global_batch_size.
    config.schedule.base_rate = 0.0015
    # The train.global_batch_size at which the learning rate is base_rate.
    config.schedule.reference_batch_size = 32
    # Factor on the learning rate of the head: of the classifier and the auxiliary classifier.
    config.schedule.head_factor = 1.0
    # Linear warm-up from 0 over these epochs.
    config.schedule.warmup_epochs = 0.0
    # "steps", or "cosine": from the end of the warm-up to 0 at cosine_steps.
    config.schedule.decay = "steps"
    # Step at which the cosine reaches 0; 0 is the last step of the run. A run that is extended then
    # follows the cosine of its new length, and its rate rises; another value keeps the cosine.
    config.schedule.cosine_steps = 0
    # decay="steps" multiplies the rate by this every decay_epochs (GoogLeNet); 1 keeps it constant.
    config.schedule.decay_factor = 0.96
    # Epochs between two multiplications of the rate by decay_factor.
    config.schedule.decay_epochs = 8.0

    config.evaluation = ConfigDict()
    # Steps between evaluations on the validation images; one more follows the last step.
    config.evaluation.every_steps = 20_000
    # Epochs between evaluations instead, in whole steps; 0 uses every_steps. On the command line,
    # --config.evaluation.every_steps replaces it.
    config.evaluation.every_epochs = 0.0
    # Validation examples per batch, over all replicas; does not change the results.
    config.evaluation.global_batch_size = 32
    # Whether the last evaluation writes classes/: accuracy by class, the confusion matrix, and the
    # most confident mistakes.
    config.evaluation.per_class = True

    config.population = ConfigDict()
    # When population statistics (Algorithm 2) replace the moving statistics: "never"; "end": in
    # the last evaluation and the finished network; "evaluations": in every evaluation too.
    config.population.when = "never"
    # Training batches that population statistics are computed from; each takes about as long as a
    # training step.
    config.population.num_batches = 100

    config.record = ConfigDict()
    # Layer whose input is recorded as percentiles during training (Figure 1b, c); "" records
    # nothing.
    config.record.layer = ""
    # Index into the input's last axis: a unit, or a feature map with all of its locations.
    config.record.unit = 0
    # Percentiles to record, numbers from 0 to 100.
    config.record.percentiles = (15, 50, 85)
    # Steps between recordings; the first one precedes the first step.
    config.record.every_steps = 250
    # How many of the first training examples are recorded, rounded up to whole batches. They stay
    # in the devices' memory.
    config.record.num_examples = 1_000

    config.checkpoint = ConfigDict()
    # Steps between checkpoints; one more is saved after the last step, and after a signal.
    config.checkpoint.every_steps = 5_000
    # Checkpoints kept, the latest ones.
    config.checkpoint.keep = 3

    config.distribution = ConfigDict()
    # "one_device", "mirrored", "multi_worker" (one process per host, listed by Slurm, SkyPilot,
    # TF_CONFIG or --workers), or "tpu" (all cores of a single-host TPU). docs/distribution.md has
    # a table of settings by device.
    config.distribution.strategy = "mirrored"
    # Replicas of "mirrored": 0 uses every GPU, or one CPU replica where there is none. Leave it at
    # 0 for the other strategies.
    config.distribution.replicas = 0

    return config.lock()


# Settings of config.model that section 4.1's network uses.
MLP_SETTINGS = {"name", "variant", "initializer", "initializer_stddev", "init_from", "freeze"}

_POSITIVE_INTEGERS = (
    "train.steps",
    "train.global_batch_size",
    "train.steps_per_loop",
    "train.micro_batches",
    "evaluation.every_steps",
    "evaluation.global_batch_size",
    "population.num_batches",
    "record.every_steps",
    "record.num_examples",
    "checkpoint.every_steps",
    "checkpoint.keep",
)
_POSITIVE = (
    "train.retry_factor",
    "schedule.reference_batch_size",
    "schedule.base_rate",
    "schedule.head_factor",
    "schedule.decay_factor",
    "schedule.decay_epochs",
    "model.width",
    "model.initializer_stddev",
)
_NOT_NEGATIVE = (
    "batch_norm.epsilon",
    "batch_norm.virtual_batch_size",
    "record.unit",
    "train.l2",
    "train.epochs",
    "evaluation.every_epochs",
    "train.patience",
    "train.retries",
    "schedule.cosine_steps",
    "schedule.warmup_epochs",
    "model.auxiliary_weight",
)
_CHOICES = {
    "train.precision": ("float32", "mixed_bfloat16", "mixed_float16"),
    "schedule.decay": ("steps", "cosine"),
    "population.when": ("never", "end", "evaluations"),
}
# With a mini-batch of up to a million examples, 64 bits hold the number of examples of a run.
_LARGEST = 10**12
_FRACTIONS = (
    "model.dropout",
    "train.momentum",
    "train.label_smoothing",
    "train.ema",
    "train.until_accuracy",
)


def check_config(config: ConfigDict) -> None:
    """Raises UsageError if a setting is missing, a number outside its range, or a mode unknown.

    Other names, such as those of models and data sets, are checked where they are looked up.
    """
    check_keys(config, "the config")
    _check_range(config, _POSITIVE_INTEGERS, lambda value: value > 0, "a positive integer")
    _check_range(config, _POSITIVE, lambda value: 0 < value < math.inf, "a positive number")
    _check_range(config, _NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more")
    _check_range(config, _FRACTIONS, lambda value: 0 <= value < 1, "0 or more and less than 1")
    _check_range(config, ["train.retry_factor"], lambda value: value <= 1, "at most 1")
    _check_range(config, ["batch_norm.momentum"], lambda value: 0 <= value <= 1, "0 to 1")
    for key, choices in _CHOICES.items():
        if (value := _value(config, key)) not in choices:
            *others, last = choices
            raise UsageError(f"unknown {key} {value!r}: expected {', '.join(others)} or {last}")
    _check_sizes(config)
    train = config.train
    if train.global_batch_size % train.micro_batches:
        raise UsageError(
            f"train.micro_batches={train.micro_batches} is invalid: expected a divisor of"
            f" train.global_batch_size={train.global_batch_size}"
        )
    check_settings(config.data)
    check_strategy(config.distribution.strategy, config.distribution.replicas)
    if config.model.freeze != "none" and not config.model.init_from:
        raise UsageError(
            f"model.freeze={config.model.freeze!r} would keep random weights: set model.init_from,"
            " or model.freeze='none'"
        )
    percentiles = config.record.percentiles
    are_numbers = all(isinstance(p, int | float) and 0 <= p <= 100 for p in percentiles)
    if not (percentiles and are_numbers):
        raise UsageError(
            f"record.percentiles={percentiles} is invalid: expected one or more numbers from 0 to"
            " 100"
        )
    if not 0 <= config.seed < 2**32:
        raise UsageError(f"seed={config.seed} is invalid: expected 0 to {2**32 - 1}")


def _check_sizes(config: ConfigDict) -> None:
    """Raises UsageError for a number so large that counts would overflow."""
    lengths = ("train.epochs", "evaluation.every_epochs")
    for key, value in flatten(config).items():
        is_count = isinstance(value, int) or key in lengths
        if is_count and abs(value) > _LARGEST:
            raise UsageError(
                f"{key}={value} is invalid: expected a number from {-_LARGEST:,} to {_LARGEST:,}"
            )


def check_keys(config: ConfigDict, origin: str) -> None:
    """Raises UsageError unless a config has exactly the keys of the schema.

    Args:
      config: config to check.
      origin: the config in words, such as "config bn_x5".
    """
    if not isinstance(config, ConfigDict):
        raise UsageError(
            f"{origin} is a {type(config).__name__}: expected a ConfigDict, such as that of"
            " bn_keras.training.config_files.load_config('digits_bn_x5')"
        )
    accepted, given = flatten(default_config()).keys(), flatten(config).keys()
    if missing := sorted(accepted - given):
        raise UsageError(
            f"{origin} has no {first_of(missing)}: expected all keys of"
            " bn_keras.training.config.default_config()"
        )
    if unknown := sorted(given - accepted):
        raise UsageError(
            f"{origin} has unknown keys: {first_of(unknown)}; remove or correct them"
            " (bn_keras.training.config.default_config() has all keys)"
        )


def _check_range(
    config: ConfigDict,
    keys: Sequence[str],
    accepts: Callable[[float], bool],
    expected: str,
) -> None:
    for key in keys:
        value = _value(config, key)
        if value is not None and not accepts(value):
            raise UsageError(f"{key}={value} is invalid: expected {expected}")


def uses_population(when: str, is_last: bool) -> bool:
    """Returns whether an evaluation uses population statistics.

    Args:
      when: config.population.when.
      is_last: whether it is the evaluation of the finished network.
    """
    return when == "evaluations" or (when == "end" and is_last)


def _value(config: ConfigDict, key: str) -> Any:
    """Returns the value of a key such as "train.steps"."""
    section, name = key.split(".")
    return config[section][name]
