"""The derivatives in the guide to gradient penalties are those that the benchmark prints."""

import importlib
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_rows_of_the_guide_are_what_the_benchmark_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("derivatives")
    benchmark.main()
    _, _, *printed = capsys.readouterr().out.splitlines()
    rows = {}
    for row in printed:
        name, *values = row.strip("| ").split(" | ")
        rows[name] = np.array(values, float)
    guide = (ROOT / "docs" / "gradient_penalties.md").read_text().replace("−", "-").replace("*", "")
    for name in ("bn_keras", "Keras 3"):
        (documented,) = [line for line in guide.splitlines() if line.startswith(f"| {name} |")]
        values = np.array(documented.strip("| ").split(" | ")[1:], float)
        np.testing.assert_array_equal(values, rows[name.split()[0]])
    np.testing.assert_allclose(rows["bn_keras"], rows["finite differences"], atol=2e-3)
    assert abs(rows["Keras"][1] - rows["finite differences"][1]) > 1
