"""The layer against PyTorch's, channels last, forward and backward (PyTorch: make test-peers).

.venv-peers/bin/python benchmarks/batch_norm_pytorch.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from _timing import compare, table
from batch_norm import SHAPES, _inputs, _name, _raw_training, _training

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
        x, dy = _inputs(shape)
        rows[_name(shape)] = compare(
            {
                "ours": _training(BatchNormalization(), x, dy),
                "raw kernels": _raw_training(x, dy),
                "PyTorch": _pytorch(x, dy),
            },
            rounds=15,
        )
    ratios = {"PyTorch/ours": ("PyTorch", "ours"), "PyTorch/raw": ("PyTorch", "raw kernels")}
    table("Forward and backward, float32", rows, ratios)


if __name__ == "__main__":
    if torch is None:
        print("left out: PyTorch is not installed (make test-peers installs it)")
    else:
        main()
