"""Modules import only what the tables below allow; one module uses private attributes of others.

A component is a module or subpackage directly inside bn_keras.
"""

import ast
import pathlib
import sys
from collections import Counter
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The components of the layer library, each with the components that it may import. A row names only
# rows above it, so there are no cycles.
LAYER_LIBRARY = {
    "cgroups": "",
    "cores": "cgroups",
    "errors": "",
    "text": "",
    "storage": "errors text",
    "keras_internals": "",
    "layer_kinds": "",
    "ops": "",
    "replicas": "errors",
    "agreement": "errors keras_internals",
    "arguments": "errors",
    "batch_norm": "arguments errors keras_internals ops replicas",
    "merge": "batch_norm errors keras_internals replicas",
    "population": "arguments batch_norm errors keras_internals ops replicas text",
    "cost": "arguments errors keras_internals layer_kinds text",
    "model_copy": "errors keras_internals text",
    "fold": "agreement arguments batch_norm errors keras_internals layer_kinds model_copy"
    " population",
    "health": "agreement arguments errors fold keras_internals population text",
    "models": "arguments batch_norm errors replicas storage text",
    "convert": "arguments batch_norm errors model_copy models storage text",
    # The package's __init__.py exports the layer library.
    "bn_keras": "batch_norm convert cost errors fold health merge models population",
}
# The components of the trainer may also import the whole layer library.
TRAINER = {
    "data": "",
    "distribute": "",
    "runs": "",
    "pictures": "data",
    "training": "data distribute pictures runs",
    "inference": "data distribute runs training",
    "experiments": "runs training",
    "report": "data experiments inference runs training",
}

# The layer library depends on these packages only, apart from imports inside functions.
DEPENDENCIES = {"tensorflow", "keras", "numpy", "h5py", "bn_keras"}
OPTIONAL_DEPENDENCIES = {("convert", "torch"), ("population", "tqdm")}

STRATEGY_CLASSES = {
    "CentralStorageStrategy",
    "MirroredStrategy",
    "MultiWorkerMirroredStrategy",
    "OneDeviceStrategy",
    "ParameterServerStrategy",
    "TPUStrategy",
}

# Methods of NamedTuple are public; os._exit is documented.
PUBLIC_DESPITE_UNDERSCORE = {"_asdict", "_exit", "_fields", "_make", "_replace"}
# TensorFlow has no public API to configure the per-device datasets of MirroredStrategy's iterators.
PRIVATE_OF_TENSORFLOW = {
    ("bn_keras/distribute/strategy.py", "_create_device_dataset"),
    ("bn_keras/ops/choice.py", "_FakeOperation"),
    ("bn_keras/ops/choice.py", "_apply_device_functions"),
}


class Import(NamedTuple):
    """One import; `is_top_level` excludes imports inside functions."""

    component: str
    module: str
    is_top_level: bool


def parse(package):
    """Returns the syntax trees of a package by path."""
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    return {path: ast.parse(path.read_text(), str(path)) for path in paths}


def component_of(path):
    return path.relative_to(ROOT / "bn_keras").parts[0].removesuffix(".py")


def imports():
    for path, tree in parse("bn_keras").items():
        component = component_of(path).replace("__init__", "bn_keras")
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                # `from bn_keras import ops` imports bn_keras.ops.
                is_package = node.module == "bn_keras"
                modules = (
                    [f"bn_keras.{a.name}" for a in node.names] if is_package else [node.module]
                )
            else:
                continue
            for module in modules:
                yield Import(component, module, node in tree.body)


def test_every_component_is_in_the_table():
    components = {component_of(path) for path in parse("bn_keras")} - {"__init__"}
    assert components == (LAYER_LIBRARY.keys() | TRAINER.keys()) - {"bn_keras"}


@pytest.mark.parametrize("table", [LAYER_LIBRARY, TRAINER], ids=["layer library", "trainer"])
def test_table_has_no_cycles(table):
    above = set()
    for component, allowed in table.items():
        assert above.issuperset(allowed.split()), component
        above.add(component)


def test_components_import_what_the_table_says():
    found = {component: set() for component in LAYER_LIBRARY | TRAINER}
    for component, module, _ in imports():
        package, _, rest = module.partition(".")
        imported = rest.partition(".")[0] or "bn_keras"
        if package == "bn_keras" and imported != component:
            found[component].add(imported)
    for component in TRAINER:
        found[component] -= LAYER_LIBRARY.keys()
    expected = {c: set(names.split()) for c, names in (LAYER_LIBRARY | TRAINER).items()}
    assert found == expected


def test_layer_library_needs_no_dependency_of_the_trainer():
    for component, module, is_top_level in imports():
        package = module.partition(".")[0]
        if component not in LAYER_LIBRARY or package in sys.stdlib_module_names:
            continue
        assert package in DEPENDENCIES or (
            (component, package) in OPTIONAL_DEPENDENCIES and not is_top_level
        ), f"{component} imports {module}"


def test_package_imports_neither_commands_nor_configs():
    packages = {module.partition(".")[0] for _, module, _ in imports()}
    assert not packages & {"launch", "bn_keras_launch", "configs", "bn_keras_configs"}


def names_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]


def test_only_distribute_names_strategy_classes():
    for package in ("bn_keras", "launch"):
        for path, tree in parse(package).items():
            if path.parent != ROOT / "bn_keras" / "distribute":
                assert not STRATEGY_CLASSES.intersection(names_in(tree)), path


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


def private_names_defined_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            if isinstance(node.args[1], ast.Constant):
                yield node.args[1].value


def private_names_used_in(tree):
    """Yields attributes, and names passed to getattr and the like."""
    functions = {"getattr", "hasattr", "setattr", "delattr", "replaced_method"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in functions:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value


def test_only_keras_internals_uses_private_attributes_of_others():
    """A private attribute that this code base does not define belongs to Keras or TensorFlow."""
    trees = parse("bn_keras") | parse("launch")
    own = {name for tree in trees.values() for name in private_names_defined_in(tree)}
    for path, tree in trees.items():
        if path == ROOT / "bn_keras" / "keras_internals.py":
            continue
        for name in private_names_used_in(tree):
            place = (path.relative_to(ROOT).as_posix(), name)
            assert (
                name in own or name in PUBLIC_DESPITE_UNDERSCORE or place in PRIVATE_OF_TENSORFLOW
            ), place


def test_module_names_are_unique():
    names = Counter(
        path.name
        for package in ("bn_keras", "launch")
        for path in parse(package)
        if path.name != "__init__.py"
    )
    assert [name for name, count in names.items() if count > 1] == []
