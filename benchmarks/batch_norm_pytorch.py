"""Compares the layer with PyTorch's, channels last, forward and backward.

make test-peers installs PyTorch.

.venv-peers/bin/python benchmarks/batch_norm_pytorch.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from _timing import compare, print_table
from batch_norm import SHAPES, kernel_training_step, name_of, random_inputs, training_step

from bn_keras import BatchNormalization

try:
    import torch
except ModuleNotFoundError:
    torch = None


def _pytorch(x, dy):
    x, dy = (
        torch.tensor(t.numpy()).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        for t in (x, dy)
    )
    layer = torch.nn.BatchNorm2d(x.shape[1], eps=1e-3, momentum=0.01)
    x.requires_grad_()

    def step():
        y = layer(x)
        return y, torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)

    return step


def main():
    torch.set_num_threads(os.cpu_count())
    print(f"TensorFlow {tf.__version__}, PyTorch {torch.__version__}, {os.cpu_count()} CPU cores")
    rows = {}
    for shape in SHAPES:
        x, dy = random_inputs(shape)
        rows[name_of(shape)] = compare(
            {
                "bn_keras": training_step(BatchNormalization(), x, dy),
                "fused kernels": kernel_training_step(x, dy),
                "PyTorch": _pytorch(x, dy),
            },
            rounds=15,
        )
    ratios = {
        "speedup over PyTorch": ("PyTorch", "bn_keras"),
        "PyTorch/fused kernels": ("PyTorch", "fused kernels"),
    }
    print_table("Forward and backward, float32", rows, ratios)


if __name__ == "__main__":
    if torch is None:
        print("skipped: PyTorch is not installed (make test-peers installs it)")
    else:
        main()
