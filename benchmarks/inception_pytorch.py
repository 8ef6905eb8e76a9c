"""Compares BN-Inception with pytorchcv's (make test-peers installs it).

    .venv-peers/bin/python benchmarks/inception_pytorch.py [float32|bfloat16 ...]

Both networks are the same: pytorchcv's is a port of the Caffe model, ours has preset "caffe".
PyTorch uses channels last. Inference uses folded networks on both sides. A training step is
forward, backward and SGD with momentum.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from _timing import compare, print_table
from batch_norm_networks import CLASSES, SIDE, _step
from batch_norm_networks import IMAGES as TRAINING_BATCH

from bn_keras import BNInception, fold_batch_norm

try:
    import torch
    from pytorchcv.models.bninception import bninception
except ModuleNotFoundError:
    torch = None

INFERENCE_BATCHES = (1, 32)


def _images(count):
    return np.random.default_rng(0).normal(size=(count, SIDE, SIDE, 3)).astype(np.float32)


def _labels(count):
    return np.random.default_rng(1).integers(CLASSES, size=count)


def _ours(policy):
    keras.config.set_dtype_policy(policy)
    model = BNInception("bn_x5", CLASSES, (SIDE, SIDE, 3), preset="caffe")
    keras.config.set_dtype_policy("float32")
    return model


def _our_inference(folded, count):
    images = tf.constant(_images(count))
    run = tf.function(lambda: folded(images, training=False))
    return lambda: run().numpy()


def _theirs():
    return bninception(num_classes=CLASSES).to(memory_format=torch.channels_last)


def _fold(module):
    """Folds each block's BN into its convolution, in place, and returns the module."""
    for child in module.modules():
        if isinstance(getattr(child, "bn", None), torch.nn.BatchNorm2d):
            child.conv = torch.nn.utils.fuse_conv_bn_eval(child.conv, child.bn)
            child.bn = torch.nn.Identity()
    return module


def _their_images(count):
    images = torch.tensor(_images(count)).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last)


def _their_inference(folded, count, dtype):
    images = _their_images(count).to(dtype)

    def run():
        with torch.inference_mode():
            return folded(images).float().numpy()

    return run


def _their_training(model, dtype):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    images, labels = _their_images(TRAINING_BATCH), torch.tensor(_labels(TRAINING_BATCH))

    def step():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main(precisions):
    torch.set_num_threads(os.cpu_count())
    print(f"TensorFlow {tf.__version__}, PyTorch {torch.__version__}, {os.cpu_count()} CPU cores")
    rows = {}
    for precision in precisions:
        dtype = getattr(torch, precision)
        # For inference, both sides store their weights in the precision of the computation.
        folded, _ = fold_batch_norm(_ours(precision))
        their_folded = _fold(_theirs().eval()).to(dtype)
        for count in INFERENCE_BATCHES:
            functions = {
                "bn_keras": _our_inference(folded, count),
                "pytorchcv": _their_inference(their_folded, count, dtype),
            }
            rows[f"inference {count}, {precision}"] = compare(functions, rounds=7)
        policy = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[precision]
        functions = {
            "bn_keras": _step(_ours(policy)),
            "pytorchcv": _their_training(_theirs().train(), dtype),
        }
        rows[f"training {TRAINING_BATCH}, {precision}"] = compare(functions, rounds=4, block=2)
    ratios = {"speedup over pytorchcv": ("pytorchcv", "bn_keras")}
    print_table(f"BN-Inception, images of {SIDE}x{SIDE}", rows, ratios)


if __name__ == "__main__":
    if torch is None:
        print("skipped: PyTorch or pytorchcv is not installed (make test-peers installs them)")
    else:
        main(sys.argv[1:] or ["float32", "bfloat16"])
