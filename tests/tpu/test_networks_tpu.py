"""The steps of the ImageNet configs lower for TPU (no TPU needed).

The tests lower the functions that the training loop and the evaluation pass to strategy.run, at
full size: forward pass, losses, backward pass, L2, the sum of the gradients over 8 cores, SGD with
momentum and schedule, moving statistics, random generators, EMA of the weights. They prove that XLA
has a TPU kernel for each operation, that every size is static, and that nothing waits for the host.

They do not prove that the TPU's own compiler, which runs after this, accepts the result and that it
fits in memory; nor what a TPU computes, and how fast. TPUStrategy itself is not tested: fakes
replace its collective and its replica id, and its copies of variables and the host loop around the
steps are left out. The input pipeline is not tested either.
"""

import lowering
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization
from bn_keras.data import pipeline
from bn_keras.data.multi_crop import Crops
from bn_keras.training.build import build_trainer
from bn_keras.training.config_files import load_config
from bn_keras.training.evaluator import Evaluator

pytest.importorskip("libtpu", reason="the wheel tensorflow-tpu is not installed: make tpu-check")

IMAGE_SHAPE, CLASSES, TRAIN_EXAMPLES = (224, 224, 3), 1000, 1_281_167
SIZES = dict(input_shape=IMAGE_SHAPE, num_classes=CLASSES, num_train_examples=TRAIN_EXAMPLES)
PER_REPLICA_BATCH_SIZE = 4

EVERYTHING = {
    "model.auxiliary_weight": 0.4,
    "model.dropout": 0.1,
    "batch_norm.synchronized": True,
    "train.micro_batches": 2,
    "train.label_smoothing": 0.1,
    "train.ema": 0.9999,
    "train.precision": "mixed_bfloat16",
    "schedule.warmup_epochs": 5.0,
    "schedule.decay": "cosine",
}


def read_config(name, **overrides):
    config = load_config(name).copy_and_resolve_references()
    config.train.global_batch_size = PER_REPLICA_BATCH_SIZE * lowering.NUM_CORES
    config.update_from_flattened_dict(overrides)
    return config


def lower_steps(trainer, labels):
    """Lowers the functions that the training loop passes on; returns HLO by function name."""
    trainer.strategy = recorder = lowering.Recorder(trainer.strategy)
    images = tf.zeros([PER_REPLICA_BATCH_SIZE, *IMAGE_SHAPE])
    trainer.trace(iter(tf.data.Dataset.from_tensors((images, labels)).repeat()))
    lowered = {name: lowering.lower(*run) for name, run in recorder.runs.items()}
    assigned = {id(v) for _, variables in lowered.values() for v in variables}
    left = [v.path for v in trainer.variables if id(v.value) not in assigned]
    assert not left
    for hlo, _ in lowered.values():
        lowering.check_runs_on_a_core(hlo)
    return {name: hlo for name, (hlo, _) in lowered.items()}


def assert_no_fused_batch_norm(counts):
    """XLA expands its batch-norm operations to E[x^2] - E[x]^2, which cancels at large means."""
    assert not [name for name in counts if name.startswith("batch-norm")]


def count_batch_norms(model):
    return sum(isinstance(layer, BatchNormalization) for layer in model.layers)


@pytest.mark.parametrize(
    "name",
    ["inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid", "bn_x30_ensemble:6"],
)
def test_a_training_step_lowers(on_a_core, name):
    config = read_config(name)
    strategy = tf.distribute.get_strategy()
    trainer = build_trainer(config, strategy, **SIZES)
    steps = lower_steps(trainer, tf.zeros([PER_REPLICA_BATCH_SIZE], tf.int32))
    assert list(steps) == ["_train_whole_batch"]
    counts = lowering.opcodes(steps["_train_whole_batch"])
    assert_no_fused_batch_norm(counts)
    # Only gradients cross cores.
    assert counts["all-reduce"] == len(trainer.model.trainable_variables)


def test_a_training_step_with_every_option_lowers(on_a_core):
    """Labels are mixtures, as with MixUp and CutMix."""
    config = read_config("bn_x5", **EVERYTHING)
    strategy = tf.distribute.get_strategy()
    trainer = build_trainer(config, strategy, **SIZES)
    steps = lower_steps(trainer, tf.zeros([PER_REPLICA_BATCH_SIZE, CLASSES]))
    assert list(steps) == ["_set_to_zero", "_accumulate_micro_batch", "_apply_accumulated"]
    part = steps["_accumulate_micro_batch"]
    # One collective forward and one backward for each layer; gradients wait for the sum.
    assert lowering.opcodes(part)["all-reduce"] == 2 * count_batch_norms(trainer.model)
    convolutions = [line for line in part.splitlines() if " convolution(" in line]
    assert convolutions and all(" = bf16[" in line for line in convolutions)
    counts = lowering.opcodes(steps["_apply_accumulated"])
    assert counts["all-reduce"] == len(trainer.model.trainable_variables)


@pytest.mark.parametrize("crops", ["1", "144"])
def test_an_evaluation_step_lowers(on_a_core, monkeypatch, crops):
    """For 144 crops the core cuts and resizes them and calls the network in a loop."""
    # Otherwise the replicas' moving statistics are merged first, by TPUStrategy itself.
    config = read_config("bn_x30", **{"data.name": "synthetic", "batch_norm.synchronized": True})
    data = pipeline.open_data(config.data, seed=0)
    strategy = tf.distribute.get_strategy()
    trainer = build_trainer(config, strategy, **SIZES)
    model = trainer.inference_model
    recorder = lowering.Recorder(strategy)
    evaluate = Evaluator([model], data, recorder, 32, Crops.parse(crops))

    class Traced(Exception):
        pass

    def check_counted(num_examples):
        raise Traced

    monkeypatch.setattr(data, "check_counted", check_counted)
    with pytest.raises(Traced):
        evaluate()
    ((step, args),) = recorder.runs.values()
    hlo, assigned = lowering.lower(step, args, constants=model.variables)
    lowering.check_runs_on_a_core(hlo)
    # The sums, and the predictions of each example.
    assert len(assigned) == 2
    counts = lowering.opcodes(hlo)
    assert_no_fused_batch_norm(counts)
    assert counts["while"] == (crops == "144")
