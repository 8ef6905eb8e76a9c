"""The built wheel is complete and works outside of the checkout."""

import configparser
import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions

import pytest
from packaging.utils import canonicalize_name
from test_docker import copied_sources, copy_sources

from launch import TRAIN_MODULES
from launch.main import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
USER_SCRIPT = ROOT / "tests" / "user_script.py"
# The folders of the checkout, and the packages that they become.
PACKAGES = {"bn_keras": "bn_keras", "configs": "bn_keras_configs", "launch": "bn_keras_launch"}
DIGITS = (
    "--config=mnist_bn",
    "--config.data.name=digits",
    "--config.data.validation_split=validation",
    "--config.evaluation.global_batch_size=100",
    "--config.train.steps=20",
)
# The wheel's environment, and the editable install of `make`, which runs this test.
EACH_ENVIRONMENT = pytest.mark.parametrize("environment", ["installed", "editable"])


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )


def output(*command, cwd):
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_of(environment, request):
    if environment == "editable":
        return pathlib.Path(sys.executable)
    return request.getfixturevalue(environment) / "bin" / "python"


def site_packages(environment):
    [folder] = environment.glob("lib/python*/site-packages")
    return folder


def make_environment(wheel, folder):
    """Installs the wheel, without its dependencies, into a new environment."""
    output(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    output(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist of the files that the Dockerfile copies."""
    source = tmp_path_factory.mktemp("source")
    copy_sources(copied_sources(), source)
    output(sys.executable, "-m", "build", "--no-isolation", source, cwd=source)
    [wheel] = source.glob("dist/*.whl")
    return wheel


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """An environment with the wheel alone."""
    return make_environment(wheel, tmp_path_factory.mktemp("bare") / "environment")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel and the dependencies, without the checkout."""
    folder = make_environment(wheel, tmp_path_factory.mktemp("installed") / "environment")
    # Python ignores the .pth files in these folders, which make the checkout importable.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages(folder) / "dependencies.pth").write_text("\n".join(dependencies))
    return folder


def test_the_wheel_contains_every_file_of_the_packages(wheel):
    expected = {
        PACKAGES[folder] + str(file.relative_to(ROOT)).removeprefix(folder)
        for folder in PACKAGES
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {"bn_keras/py.typed", "bn_keras_launch/cloud/startup.sh"} <= names


def test_the_wheel_installs_no_general_names(bare):
    names = {path.name for path in site_packages(bare).iterdir()}
    assert {name for name in names if ".dist-info" not in name} == set(PACKAGES.values())


def test_the_commands_without_the_extra_name_it_in_one_line(bare, tmp_path):
    for arguments in ([], ["train", *DIGITS, "--workdir=run"]):
        done = run(bare / "bin" / "bn-keras", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and not done.stdout
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ") and "bn_keras[cpu,train]" in line
        assert line.endswith(f"missing modules: {', '.join(TRAIN_MODULES)}")
    assert not list(tmp_path.iterdir())


def test_the_commands_check_every_requirement_of_the_extra():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = setup["options.extras_require"]["train"].split("\n")
    expected = {canonicalize_name(re.match(r"[\w-]*", line)[0]) for line in requirements} - {""}
    distributions = packages_distributions()
    checked = {canonicalize_name(n) for module in TRAIN_MODULES for n in distributions[module]}
    assert checked == expected


@EACH_ENVIRONMENT
def test_bn_keras_lists_its_commands_in_any_folder(environment, request, tmp_path):
    bn_keras = python_of(environment, request).with_name("bn-keras")
    listed = output(bn_keras, "--help", cwd=tmp_path)
    assert re.findall(r"^  (\w+)", listed, flags=re.MULTILINE) == list(COMMANDS)


def test_every_config_loads_by_name(installed, tmp_path):
    code = """
import bn_keras_configs
from bn_keras.training.config_files import config_names, load_config
for name in config_names():
    load_config(name)
    print(name)"""
    names = output(installed / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert names == sorted(file.stem for file in (ROOT / "configs").glob("[a-z]*.py"))


def test_bn_keras_trains_and_evaluates_in_any_folder(installed, tmp_path):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir(), other.mkdir()
    bn_keras = installed / "bin" / "bn-keras"
    output(bn_keras, "train", *DIGITS, "--workdir=run", cwd=empty)
    assert [path.name for path in empty.iterdir()] == ["run"]
    last = json.loads((empty / "run" / "metrics.jsonl").read_text().splitlines()[-1])

    row = json.loads(output(bn_keras, "evaluate", "--workdir=../empty/run", "--json", cwd=other))
    assert row["step"] == last["step"] == 20
    assert row["accuracy"] == pytest.approx(last["validation/accuracy"])
    assert not list(other.iterdir())


def test_a_user_script_runs_without_the_extra(installed, tmp_path):
    # absl stays: Keras needs it, too.
    hidden = dict.fromkeys(set(TRAIN_MODULES) - {"absl"})
    code = f"""
import runpy, sys
sys.modules.update({hidden})
runpy.run_path(sys.argv[1], run_name="__main__")"""
    printed = output(installed / "bin" / "python", "-c", code, USER_SCRIPT, cwd=tmp_path)
    assert "multiply-adds" in printed.splitlines()[-1]


@EACH_ENVIRONMENT
def test_a_type_checker_in_any_folder_finds_the_types(environment, request, tmp_path):
    python = python_of(environment, request)
    script = tmp_path / "script.py"
    script.write_text(f"{USER_SCRIPT.read_text()}\nreveal_type(bn_keras.fold_batch_norm)\n")
    mypy = (sys.executable, "-m", "mypy", "--ignore-missing-imports", "--python-executable", python)
    found = output(*mypy, script, cwd=tmp_path)
    # Without the package's types, the revealed type would be Any.
    assert re.search(r'type is "def \(model: Any.*\) -> tuple\[Any, .*FoldReport', found), found
