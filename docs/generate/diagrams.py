"""The diagrams of the site, drawn from the code where the code has what they show."""

import ast
import pathlib

from svg import Box, Drawing

from bn_keras.models.bn_inception import FIGURE_5, PRESETS, STEMS, Row

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Widths of the drawing of modules, and of a box in it.
_WIDTH, _BOX = 720, 108
_BRANCHES = ("branch1", "branch2", "branch3", "branch4")


def figure_5() -> str:
    """Draws the paper's Figure 5 from the table that the network is built from."""
    drawing = Drawing(720, 132 + 60 * len(FIGURE_5), "BN-Inception, module by module")
    columns, column_width, left = (188, 258, 362, 500), (62, 96, 130, 110), 188
    headings = ("1×1", "1×1 → 3×3", "1×1 → 3×3 → 3×3", "pool → 1×1")
    pixels_per_channel = 422 / 1024

    stem = STEMS["imagenet"]
    side = 224 // stem.stride // 4
    kind = "separable " if stem.separable else ""
    drawing.box(
        left,
        0,
        422,
        52,
        [
            f"224×224×3 → {kind}{stem.size}×{stem.size} of 64, stride {stem.stride} → pool",
            f"→ 1×1 of 64 → 3×3 of 192 → pool → {side}×{side}×192",
        ],
    )
    drawing.text(0, 26, "stem", "start", "strong")
    for x, width, heading in zip(columns, column_width, headings, strict=True):
        drawing.text(x + width / 2, 74, heading, kind="small")
    channels, y = 192, 92
    for row in FIGURE_5:
        if row.name in ("4c", "4d"):
            row = row._replace(projection=PRESETS["paper"].pool_projection)
        parts = branch_channels(row, channels)
        channels, side = sum(parts), side // row.stride
        drawing.text(0, y + 18, row.name, "start", "strong")
        drawing.text(34, y + 18, f"{side}×{side}×{channels}", "start")
        if row.stride > 1:
            drawing.text(130, y + 18, f"stride {row.stride}", "start", "small")
        chains = (
            [row.conv1x1],
            [row.reduce3x3, row.conv3x3],
            [row.reduce_double, row.conv_double, row.conv_double],
            [row.pool, row.projection],
        )
        x = float(left)
        for i, chain in enumerate(chains):
            if not parts[i]:
                continue
            text = " → ".join(str(part) for part in chain if part)
            drawing.box(columns[i], y, column_width[i], 22, [text], _BRANCHES[i])
            width = parts[i] * pixels_per_channel
            drawing.box(x, y + 27, width, 12, [], f"bar {_BRANCHES[i]}")
            x += width
        y += 60
    drawing.text(left, y + 10, "average over the map → dropout → classifier", "start", "small")
    return str(drawing)


def branch_channels(row: Row, channels: int) -> tuple[int, int, int, int]:
    """Returns the output channels of a module's four branches.

    Args:
      row: the module.
      channels: channels of its input, which a pool without a projection passes through.
    """
    return row.conv1x1, row.conv3x3, row.conv_double, row.projection or channels


def layer() -> str:
    """Draws a BN layer forward and backward."""
    drawing = Drawing(720, 330, "A BN layer: the forward and the backward pass")
    drawing.text(0, 12, "forward", "start", "strong")
    x = drawing.box(0, 70, 70, 34, ["x"], "input")
    moments = drawing.box(130, 30, 150, 44, ["μ = mean of x", "σ² = variance of x"])
    normalized = drawing.box(330, 70, 170, 34, ["x̂ = (x − μ) / √(σ² + ε)"])
    y = drawing.box(590, 70, 130, 34, ["y = γ x̂ + β"], "output")
    moving = drawing.box(330, 0, 210, 34, ["moving mean and variance"], "state")
    drawing.arrow(x.right, moments.left)
    drawing.arrow(x.right, normalized.left)
    drawing.arrow(moments.right, normalized.left)
    drawing.arrow(moments.right, moving.left, "dashed")
    drawing.arrow(normalized.right, y.left)
    drawing.text(0, 162, "backward", "start", "strong")
    dy = drawing.box(590, 230, 130, 34, ["g = ∂L/∂y"], "input")
    sums = drawing.box(330, 180, 170, 44, ["dβ = Σ g", "dγ = Σ g x̂"], "output")
    drawing.box(0, 270, 380, 44, ["∂L/∂x =", "γ/√(σ² + ε) · (g − dβ/m − x̂ dγ/m)"], "output")
    drawing.arrow(dy.left, sums.right)
    drawing.arrow((590, 252), (382, 286))
    drawing.curve((380, 224), (330, 268))
    return str(drawing)


def replicas() -> str:
    """Draws what synchronized replicas exchange."""
    drawing = Drawing(720, 250, "What the replicas of a synchronized layer exchange")
    drawing.text(0, 12, "forward", "start", "strong")
    drawing.text(380, 12, "backward", "start", "strong")
    for left, own, merged in (
        (0, "m, μ, σ²", ["M, μ, σ² of all rows,", "the same bits on every replica"]),
        (380, "Σ g, Σ g x̂", ["S₁, S₂ of all rows", "→ each replica's own dx"]),
    ):
        table = Box(left + 60, 130, 220, 0)
        for i in range(3):
            replica = drawing.box(left + 118 * i, 30, 104, 44, [f"replica {i}", own], "input")
            end = (table.x + 110 + (i - 1) * 76, 108)
            drawing.arrow(replica.bottom, end)
        reduced = drawing.box(
            left + 40, 110, 260, 44, ["one all-reduce:", "a table with a row per replica"], "state"
        )
        result = drawing.box(left + 40, 196, 260, 48, merged, "output")
        drawing.arrow(reduced.bottom, result.top)
    return str(drawing)


def modules() -> str:
    """Draws the components of bn_keras and their imports, from the table that a test enforces.

    An arrow points from what is imported to what imports it. Not drawn are imports that follow from
    others, those of the trainer from the library, and those of components that import nothing.
    """
    library, trainer = _import_tables()
    del library["bn_keras"]  # the package itself imports all of them
    shared = [name for name, imported in library.items() if not imported]
    rows = {
        name: set(imported.split()).difference(shared)
        for name, imported in (library | trainer).items()
        if name not in shared
    }
    levels: dict[str, int] = {}
    for name, imported in rows.items():
        in_library = [level for other, level in levels.items() if other in library]
        first = 1 + max(in_library) if name in trainer else 1
        levels[name] = max([first, *(1 + levels[other] for other in imported)])
    centres = _place(rows, levels)
    height = 62 * max(levels.values()) + 30
    drawing = Drawing(_WIDTH, height, "The modules of bn_keras and their imports")
    text = f"used everywhere: {', '.join(shared)}"
    drawing.box(0, 0, _WIDTH, 26, [text])
    for name, imported in rows.items():
        implied = set().union(*(_reachable(other, rows) for other in imported))
        for other in sorted(imported - implied):
            start = (centres[other], 62 * levels[other] + 26)
            drawing.curve(start, (centres[name], 62 * levels[name]), "thin")
    for name, x in centres.items():
        kind = "branch4" if name in trainer else "branch2"
        drawing.box(x - _BOX / 2, 62 * levels[name], _BOX, 26, [name], kind)
    return str(drawing)


def training() -> str:
    """Draws how data flows through a training run."""
    drawing = Drawing(720, 300, "How data flows through a training run")
    config = drawing.box(0, 0, 150, 44, ["configs, launch", "what to train"], "branch1")
    data = drawing.box(0, 110, 150, 44, ["data", "batch of step s"], "branch4")
    step = drawing.box(270, 110, 180, 44, ["training", "step: loss, gradients"], "branch4")
    devices = drawing.box(270, 0, 180, 44, ["distribute", "replicas and workers"], "branch4")
    network = drawing.box(270, 220, 180, 44, ["models, batch_norm", "the network"], "branch2")
    run = drawing.box(570, 102, 150, 60, ["runs", "checkpoints,", "metrics.jsonl"], "branch4")
    use = drawing.box(570, 220, 150, 60, ["inference, report", "evaluation, export,", "figures"])
    drawing.arrow(config.right, devices.left)
    drawing.arrow(config.bottom, data.top)
    drawing.arrow(data.right, step.left, label="images, labels")
    drawing.arrow(devices.bottom, step.top)
    drawing.arrow(network.top, step.bottom)
    drawing.arrow(step.right, run.left, label="variables")
    drawing.arrow(run.bottom, use.top)
    return str(drawing)


def _import_tables() -> tuple[dict[str, str], dict[str, str]]:
    """Returns the tables of the layer library and of the trainer in tests/test_architecture.py."""
    tree = ast.parse((_ROOT / "tests" / "test_architecture.py").read_text())
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("LAYER_LIBRARY", "TRAINER")
    }
    return tables["LAYER_LIBRARY"], tables["TRAINER"]


def _place(rows: dict[str, set[str]], levels: dict[str, int]) -> dict[str, float]:
    """Returns the horizontal centre of each component.

    A component is below the mean of what it imports, as far as its neighbours leave room. Those
    that import nothing are in the order of the components that import them.
    """
    importers = {name: [n for n, imported in rows.items() if name in imported] for name in rows}
    centres: dict[str, float] = {}
    for level in range(1, max(levels.values()) + 1):
        names = [name for name in rows if levels[name] == level]
        roots = sorted(
            (name for name in names if not rows[name]),
            key=lambda name: min((levels[other] for other in importers[name]), default=99),
        )
        wanted = {name: _WIDTH * (i + 0.5) / len(roots) for i, name in enumerate(roots)}
        for name in set(names) - wanted.keys():
            wanted[name] = sum(centres[other] for other in rows[name]) / len(rows[name])
        least = _BOX / 2
        for i, name in enumerate(sorted(names, key=lambda name: (wanted[name], name))):
            room = _WIDTH - _BOX / 2 - (len(names) - 1 - i) * (_BOX + 12)
            centres[name] = min(max(wanted[name], least), room)
            least = centres[name] + _BOX + 12
    return centres


def _reachable(name: str, rows: dict[str, set[str]]) -> set[str]:
    """Returns everything that a component imports, directly or not."""
    return set().union(*({other} | _reachable(other, rows) for other in rows[name]))
