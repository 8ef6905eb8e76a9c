"""The documentation site: its generated parts, and the pages that a change of the code affects.

`make docs` builds the site, and fails on a broken link or an unknown name.
"""

import ast
import json
import pathlib
import re
import signal
import sys
import xml.etree.ElementTree as ET

import pytest

import bn_keras
from bn_keras.runs.settings import flatten
from bn_keras.training.config import default_config
from bn_keras.training.config_files import load_config
from bn_keras.training.loop import train_and_evaluate

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

DIAGRAMS = ["figure_5", "layer", "replicas", "modules", "training"]


@pytest.fixture(scope="module")
def generate():
    """Imports docs/generate as MkDocs does, with its folder on the path."""
    sys.path.insert(0, str(DOCS / "generate"))
    import diagrams
    import reference_pages

    sys.path.remove(str(DOCS / "generate"))
    return {"diagrams": diagrams, "reference": reference_pages}


def test_pages_use_every_generated_part():
    tree = ast.parse((DOCS / "generate" / "hooks.py").read_text())
    [table] = [node.value for node in tree.body if isinstance(node, ast.AnnAssign)]
    names = [key.value for key in table.keys]
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert sorted(re.findall(r"<!-- generate: (\w+) -->", pages)) == sorted(names)


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    assert {f"bn_keras.{name}" for name in bn_keras.__all__} <= set(shown)
    assert len(shown) == len(set(shown))


def test_the_reference_has_every_setting_with_a_meaning_of_its_own(generate):
    settings = list(generate["reference"].read_settings())
    assert {s.key: s.default for s in settings} == flatten(default_config())
    meanings = [setting.meaning for setting in settings]
    assert all(meanings) and len(set(meanings)) == len(meanings)


def test_the_table_of_configs_has_every_file(generate):
    table = generate["reference"].configs()
    shown = re.findall(r"^\| `(\w+).*?` \| (.+?) \| [\d,]+ \w+ \|$", table, flags=re.MULTILINE)
    files = {file.stem for file in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert {name for name, _ in shown} == files and len(shown) == len(files)
    meanings = [meaning for _, meaning in shown]
    assert len(set(meanings)) == len(meanings)


def test_the_exit_statuses_are_those_of_the_code(generate):
    reference_pages = generate["reference"]
    listed = [status for statuses, _ in reference_pages.read_statuses() for status in statuses]
    assert len(listed) == len(set(listed))
    of_errors = set(reference_pages._statuses_of_errors().values())
    of_signals = {128 + s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    # 1: a traceback, or faults found by `check`; 4: launch/cloud.
    assert set(listed) == {0, 1, 4} | of_errors | of_signals


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_valid_and_inside_its_frame(generate, name):
    figure = getattr(generate["diagrams"], name)()
    assert "\n" not in figure  # Markdown would end the figure there
    [svg] = ET.fromstring(figure)
    width, height = map(float, svg.get("viewBox").split()[2:])
    boxes = svg.findall("rect")
    assert boxes
    for box in boxes:
        x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    # Narrow fonts need about 6 pixels a character.
    for text in svg.findall("text"):
        assert len(text.text) * 6 <= width


def test_the_drawn_network_has_the_output_sizes_of_the_paper(generate):
    drawn = re.findall(r">(\d\w)</text><text[^>]*>(\d+)×\d+×(\d+)<", draw(generate, "figure_5"))
    assert {name: (int(side), int(channels)) for name, side, channels in drawn} == {
        "3a": (28, 256),
        "3b": (28, 320),
        "3c": (14, 576),
        "4a": (14, 576),
        "4b": (14, 576),
        "4c": (14, 576),
        "4d": (14, 576),
        "4e": (7, 1024),
        "5a": (7, 1024),
        "5b": (7, 1024),
    }


def draw(generate, name):
    return getattr(generate["diagrams"], name)()


def test_the_drawn_modules_are_those_of_the_import_table(generate):
    library, trainer = generate["diagrams"]._import_tables()
    text = draw(generate, "modules")
    for name in (library | trainer).keys() - {"bn_keras"}:
        assert re.search(rf"\b{name}\b", text), name


def test_the_table_of_metrics_has_every_key_of_a_run(tmp_path):
    config = load_config("mnist_baseline").unlock()
    config.data.name = "digits"
    config.data.validation_split = "validation"
    config.train.steps = config.train.steps_per_loop = 2
    config.train.ema = 0.9
    config.record.layer = "sigmoid_3"
    config.record.num_examples = 60
    config.evaluation.per_class = False
    train_and_evaluate(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    written = {key for line in lines for key in json.loads(line)}
    keys = re.findall(r"^\| (`.+?) \|", (DOCS / "metrics.md").read_text(), flags=re.MULTILINE)
    listed = set(re.findall(r"`([^`]+)`", " ".join(keys)))
    # Only a run that diverges writes these two.
    assert listed == written | {"diverged", "retry"}


def cells_of(script):
    """Returns the cells of a script in jupytext's percent format, without its header."""
    _, *cells = re.split(r"^# %%( \[markdown\])?\n", script.split("# ---\n", 2)[2], flags=re.M)
    for kind, text in zip(cells[::2], cells[1::2], strict=True):
        text = text.strip("\n")
        yield re.sub(r"^# ?", "", text, flags=re.M) if kind else text


def test_the_notebook_is_that_of_its_script_and_ran_without_errors():
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    assert cells == list(cells_of((ROOT / "examples" / "tour.py").read_text()))
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    assert all(o["output_type"] in ("display_data", "stream", "execute_result") for o in outputs)
