"""What README, CONTRIBUTING, CHANGELOG and docs/ show really works.

Blocks are ```python, ```text (output), ```math, and shell, ```sh or indented. Of these, and of
`inline code` that is a command, it is checked by what comes first:

| Python                 | it runs, a page's blocks in order
| launch.X               | the command itself parses it: flags, config file, overrides and their
|                        | types, subcommands; then the config's numbers and its strategy. With
|                        | --dry_run it runs, where that needs no TensorFlow
| make                   | make -n; and the Makefile uses the variables
| python benchmarks/X.py | the file is there, and knows the words that it is given
| pip install            | setup.cfg has the extras
| docker                 | the Dockerfile has the ARG, setup.cfg the extra; launch.X in it as above
| gcloud, and the others | only that bash can parse it: they need an account, or devices, or do
| of UNCHECKED           | not end

All shell blocks go through bash -n, and a line that is none of these fails. Of inline code, flags
by themselves, keys of the config, files and names in bn_keras have to be there as well.
"""

import configparser
import inspect
import json
import os
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

import bn_keras
from bn_keras.distribute.strategy import STRATEGIES
from bn_keras.errors import UsageError
from bn_keras.training.build import build_schedule
from bn_keras.training.config import check_config, default_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

LEFT_OUT = "..."
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$\n?", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)(?:(?: {4}.*)?\n)*")
INLINE = re.compile(r"`([^`]+)`")
UNCHECKED = ("gcloud", "tensorboard", "source", "export", "for", "wait")
DOCKER_FLAGS = {"--gpus", "--privileged", "--network"}
IMAGE = "bn_keras"
FILES_OF_A_RUN = ("config.json",)

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
MAKEFILE = (ROOT / "Makefile").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BENCHMARKS = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
FOLDERS = ("bn_keras", "launch", "configs", "tests", "benchmarks", "docs")


@EACH_PAGE
def test_blocks_of_python_run(page):
    # The blocks of a page are read in order, as by somebody who follows it.
    names = {}
    for kind, block in FENCE.findall(page.read_text()):
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)


@EACH_PAGE
def test_links_lead_somewhere(page):
    for file, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]


@pytest.fixture(scope="module")
def found():
    """By page, what is wrong with its commands; all are parsed by one process."""
    return dict(zip(PAGES, problems([page.read_text() for page in PAGES]), strict=True))


@EACH_PAGE
def test_commands_and_inline_code_can_be_meant(page, found):
    assert not found[page]


DIGITS = "python -m launch.train --config=configs/digits_bn_x5.py"
PLANTED_IN_BLOCKS = [
    f"{DIGITS} --wrkdir=runs/a",
    f"{DIGITS} --config.train.stepz=3 --workdir=runs/a",
    f"{DIGITS} --config.train.steps=many --workdir=runs/a",
    f"{DIGITS} --config.train.steps=0 --workdir=runs/a",
    f"{DIGITS} --config.distribution.strategy=mirored --workdir=runs/a",
    f"{DIGITS} \\\n        --config.schedule.decay=linear --workdir=runs/a",
    f"for index in 0 1; do\n        TF_CONFIG='{{'$index'}}' {DIGITS} &\n    done; wait",
    "$ python -m launch.trian --workdir=runs/a\n    trained",
    "python -m launch.train --config=configs/digits_bn_x6.py --workdir=runs/a",
    "python -m launch.tpu sumbit --workdir=gs://bucket/a",
    "python -m launch.tpu submit --workdir=runs/a --name=a --zone=us-east5-b"
    " --accelerator_type=v6e-8 --config=configs/bn_x5.py --dry_run",
    "python -m launch.reproduce figure9 --workdir=runs/a",
    "make tset",
    "make data-imagenet MANUAL=folder",
    "python benchmarks/batch_nrom.py",
    "python benchmarks/batch_norm.py flaot32",
    ".venv-pears/bin/python benchmarks/batch_norm.py",
    'pip install ".[gpus]"',
    "docker build --build-arg EXTAR=gpu .",
    "docker build --build-arg EXTRA=cuda .",
    "docker run --rm bn_keras launch.train --workdir=/runs",
    "docker run --rm bn-keras launch.train --help",
    "pyhton -m launch.train",
    "make 'test",
]
PLANTED_INLINE = [
    "launch.train --dryrun",
    "python -m launch.evaluate --crop=1 ...",
    "make tset",
    "docker build --build-arg EXTRA=cpu\\|gpu\\|tpv .",
    "--verify_resme",
    "--scale=cifar11",
    "--config.data.shufle=shards",
    "train.micro_batch",
    "train.steps=many",
    "bn_keras/op.py",
    "nowhere.py",
    "bn_keras.replace_batchnorm",
    ".[gpus]",
]


def test_what_is_wrong_is_found():
    texts = [f"As in\n\n    {line}\n" for line in PLANTED_IN_BLOCKS]
    texts += [f"| as in | `{code}` |" for code in PLANTED_INLINE]
    texts.append("```sh\nmake demmo\n```\n")
    texts.append("```pyhton\nprint()\n```\n")
    counts = {text: len(wrong) for text, wrong in zip(texts, problems(texts), strict=True)}
    assert {text for text, count in counts.items() if count != 1} == set()


def test_the_table_of_arguments_is_the_layers():
    text = (ROOT / "docs" / "layer.md").read_text()
    table = text.partition("## Arguments")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.+?) \| .+? \|", table, flags=re.MULTILINE)
    shown = {}
    for names, defaults in rows:
        names, defaults = re.findall(r"`(\w+)`", names), defaults.replace("`", "").split(", ")
        shown |= zip(names, defaults * len(names) if len(defaults) == 1 else defaults, strict=False)
    parameters = inspect.signature(bn_keras.BatchNormalization).parameters
    assert shown.keys() == parameters.keys() - {"kwargs"}
    for name, text in shown.items():
        assert text.replace("−", "-") == str(parameters[name].default), name


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {bn_keras.__version__}\n" in citation
    assert f"\nlicense: {SETUP['metadata']['license']}\n" in citation


# --- What is wrong with a page.


def problems(texts):
    """What is wrong with each text, as lists of lines."""
    found, commands = [[] for _ in texts], []
    for wrong, text in zip(found, texts, strict=True):
        for shown, arguments in pieces(text, wrong):
            try:
                to_parse = check(arguments)
            except Wrong as error:
                wrong.append(f"{shown}: {error}")
            else:
                commands += [(wrong, shown, to_parse)] if to_parse else []
    for (wrong, shown, arguments), (error, config) in zip(
        commands, parsed([arguments for _, _, arguments in commands]), strict=True
    ):
        error = error or (config and problem_of_config(config)) or problem_of_dry_run(arguments)
        wrong += [f"{shown}: {error}"] if error else []
    return found


def pieces(text, wrong):
    """Commands and inline code: as shown, and as lists of words, "..." where some are left out."""
    blocks = INDENTED.findall(FENCE.sub("", text))
    for kind, block in FENCE.findall(text):
        if kind == "sh":
            blocks.append(block)
        elif kind not in ("python", "text", "math"):
            wrong.append(f"a block of unknown kind {kind!r}")
    for block in blocks:
        lines = shell_lines(block)
        if error := run(["bash", "-n"], input="\n".join(lines)):
            wrong.append(f"{block}: {error}")
            continue
        for line in lines:
            yield from ((line, words) for words in simple_commands(line))
    for code in INLINE.findall(INDENTED.sub("", FENCE.sub("", text))):
        for shown in alternatives(" ".join(code.replace("\\|", "|").split())):
            if words := words_of_inline(shown):
                yield shown, words


def shell_lines(block):
    """A block's commands, one a line; where there is a prompt, the rest is their output."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^ {4}", "", block, flags=re.MULTILINE)).splitlines()
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return prompted or lines


def simple_commands(line):
    """Without what joins them, and without the variables that are set in front of them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            if words:
                yield words
            words = []
        elif words or not (word in ("do", "done") or re.match(r"\w+=", word)):
            words.append(word)


def alternatives(code):
    """Of "make A|B", "make A" and "make B"."""
    choice = re.search(r"=(\w+(?:\|\w+)+)", code)
    if not choice:
        return [code]
    return [code.replace(choice[1], option) for option in choice[1].split("|")]


def words_of_inline(code):
    """Of what is meant as a command, a flag, a key, a file or a name of ours; else nothing."""
    first, *rest = code.split()
    is_command = rest and first in ("make", "pip", "docker", *UNCHECKED)
    if is_command or re.match(r"(\S+/)?python$|--\w|launch\.", first):
        return [*shlex.split(code), LEFT_OUT]
    sections = "|".join(default_config())
    is_key = re.fullmatch(rf"config(\.\w+)+|({sections})(\.\w+)+", code.partition("=")[0])
    is_ours = re.match(rf"({'|'.join(FOLDERS)})/[\w./]*$|bn_keras(\.\w+)+|\.\[\w+\]$", code)
    is_key = is_key and code not in FILES_OF_A_RUN
    if is_key or is_ours or re.fullmatch(r"\w+\.py", code):
        return [code]
    return []


# --- Each kind. What is wrong is raised; what is left for a command to parse is returned.


class Wrong(Exception):
    pass


def require(condition, what):
    if not condition:
        raise Wrong(what)


def check(words):
    first, *rest = words
    if re.fullmatch(r"(\S+/)?python", first):
        return check_python(first, rest)
    if first.startswith("launch."):
        return check_launch(first, rest)
    if first.startswith("--"):
        return check_flags(words)
    if first == "make":
        check_make(rest)
    elif first == "pip":
        check_extras(re.findall(r"\[(\w+)\]", " ".join(rest)))
    elif first == "docker":
        return check_docker(rest)
    elif first not in UNCHECKED:
        return check_name(first)
    return None


def check_python(python, words):
    folder = python.rpartition("bin/python")[0]
    require(folder in MAKEFILE, f"make sets up no {folder}")
    if words == [LEFT_OUT]:
        return None
    if words[0] == "-m":
        return check_launch(words[1], words[2:])
    script, *given = [word for word in words if word != LEFT_OUT]
    require((ROOT / script).is_file(), f"there is no {script}")
    text = (ROOT / script).read_text()
    for word in given:
        require("/" in word or word.partition("=")[0] in text, f"{script} knows no {word}")
    return None


def check_launch(command, words):
    if command == "launch.NAME":
        return None
    file = ROOT / f"{command.replace('.', '/')}.py"
    require(command.startswith("launch.") and file.is_file(), f"there is no {command}")
    words = filled_in(words)
    return [command, *words] if words != [LEFT_OUT] else None


def check_flags(words):
    """Of flags by themselves, which belong to a command, a benchmark or docker."""
    words = [word for word in filled_in(words) if word != LEFT_OUT]
    names = {word.partition("=")[0] for word in words}
    if names <= DOCKER_FLAGS or all(f'"{name}"' in BENCHMARKS for name in names):
        return None
    return ["", *words]


def filled_in(words):
    """With numbers for the letters that stand for them, and without --config.KEY=VALUE."""
    words = [re.sub(r"=[A-Za-z]$", "=1", word) for word in words]
    words = [word.replace("configs/NAME.py", LEFT_OUT) for word in words]
    return [word for word in words if word != "--config.KEY=VALUE"]


def check_make(words):
    words = [word for word in words if word != LEFT_OUT]
    targets = [word for word in words if "=" not in word]
    error = run(["make", "-n", *targets])
    require(not error, error)
    for word in set(words) - set(targets):
        require(f"$({word.partition('=')[0]})" in MAKEFILE, f"the Makefile has no {word}")


def check_extras(extras):
    for extra in extras:
        require(extra in SETUP["options.extras_require"], f"there is no extra {extra}")


def check_docker(words):
    for name, value in re.findall(r"--build-arg (\w+)=(\w+)", " ".join(words)):
        require(f"\nARG {name}" in DOCKERFILE, f"the Dockerfile has no ARG {name}")
        check_extras([value])
    if words[0] != "run":
        return None
    require(IMAGE in words, f"the image is called {IMAGE}")
    command, *rest = words[words.index(IMAGE) + 1 :]
    return check_launch(command, rest)


def check_name(name):
    """Of an extra, something in bn_keras, a file or a key of the config."""
    if name.startswith(".["):
        check_extras([name[2:-1]])
    elif name.startswith("bn_keras."):
        require(resolves(name.partition("(")[0]), "there is no such name")
    elif "/" in name:
        require("NAME" in name or (ROOT / name).exists(), "there is no such file")
    elif name.endswith(".py"):
        require(any(any((ROOT / folder).rglob(name)) for folder in FOLDERS), "no such file")
    elif "." in name and name.partition(".")[0] in ("config", *default_config()):
        return check_key(name.removeprefix("config."))
    else:
        raise Wrong(f"{name} is none of the commands that this test knows")
    return None


def resolves(name):
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


def check_key(text):
    key, _, value = text.partition("=")
    node = default_config()
    for part in key.split("."):
        require(isinstance(node, ConfigDict) and part in node, "there is no such key")
        node = node[part]
    return check_launch("launch.train", [f"--config.{text}", LEFT_OUT]) if value else None


# --- Parsing.


def parsed(commands):
    """What parse_commands.py finds wrong with each, and their configs."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "parse_commands.py"],
        input=json.dumps(commands),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def problem_of_config(config):
    config = ConfigDict(config)
    try:
        check_config(config)
        build_schedule(config, num_train_examples=1000)
    except UsageError as error:
        return str(error)
    strategy = config.distribution.strategy
    return "" if strategy in STRATEGIES else f"there is no strategy {strategy}"


def problem_of_dry_run(arguments):
    """Runs what needs no TensorFlow to show what it would do."""
    if arguments[0] != "launch.tpu" or "--dry_run" not in arguments or LEFT_OUT in arguments:
        return ""
    return run([sys.executable, "-m", *arguments])


def run(command, **options):
    """Gives the errors of a command that fails, else nothing."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    return (done.stderr or done.stdout or "failed") if done.returncode else ""
