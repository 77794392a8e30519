"""The project's promises about itself: commands, dependencies, layout, imports."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from bn_callbacks import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bn_callbacks"

# A module may import those of lower floors, and its neighbours in the same folder.
FLOORS = (
    {
        *("arguments", "budget", "distribution", "episodes", "installing", "names"),
        *("pictures", "statistics", "version", "warn"),
    },
    {"layers", "report"},
    {"evidence", "measuring"},
    {"auditing", "tensorboard", "watching"},
    {"pooling", "recalibration"},
    {"callbacks"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Not stable between versions of Keras; attributes of our own `self` may be called so.
PRIVATE_KERAS = re.compile(
    r"""
    _flatten_layers | _layers | _nodes_by_depth | _operations | _functional
    | _inbound_nodes | _outbound_nodes | _call_has_training_arg | _call_context
    | _trainable_variables | _non_trainable_variables | _moments | _metrics
    | _distribute_strategy | _tracker
    """,
    re.VERBOSE,
)


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; a package's own name ends `__init__`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def room(module: str) -> str:
    return module.split(".")[0]


def imported_names(source: str, module: str) -> set[str]:
    """Full dotted names of everything that the source of a module imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = ["bn_callbacks", *module.split(".")][: -node.level or None]
            base = [*parents, node.module] if node.level else [node.module]
            origin = ".".join(filter(None, base))
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def upward_imports(source: str, module: str) -> list[str]:
    """Names that a module imports from its own floor or above, neighbours excepted."""
    violations = []
    for name in sorted(imported_names(source, module)):
        package, *rest = name.split(".")
        if package != "bn_callbacks":
            continue
        target = rest[0] if rest and rest[0] in FLOOR else "__init__"
        neighbours = target == room(module) != module
        if not neighbours and FLOOR[target] >= FLOOR[room(module)]:
            violations.append(name)
    return violations


def private_keras(source: str, module: str) -> list[str]:
    """What the source of a module uses of Keras' private modules and attributes."""
    imports = [n for n in imported_names(source, module) if n.startswith("keras.src")]
    return sorted(imports) + [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and (PRIVATE_KERAS.fullmatch(node.attr) or ast.unparse(node) == "keras.src")
        and ast.unparse(node.value) != "self"
    ]


def pictured_modules(markdown: str) -> set[str]:
    """Modules in the tree drawn under `bn_callbacks/` in the first ```text block."""
    tree = re.search(r"```text\nbn_callbacks/\n(.*?)```", markdown, re.DOTALL)
    assert tree, "There is no picture of the house"
    found, folder = set(), ""
    for indent, name, kind in re.findall(
        r"^( +)(\w+)(/|\.py)", tree.group(1), re.MULTILINE
    ):
        if kind == "/":
            folder = f"{name}."
        else:
            found.add(name if len(indent) == 2 else folder + name)
    return found


def readme_test_command() -> str:
    readme = (ROOT / "README.md").read_text("utf-8")
    match = re.search(r"<!-- test-command -->\n```bash\n(.*?)\n```", readme, re.DOTALL)
    assert match, "The README does not mark its test command"
    return match.group(1)


def test_readme_has_two_commands_near_its_top():
    top = "\n".join((ROOT / "README.md").read_text("utf-8").splitlines()[:40])
    commands = re.findall(r"```bash\n(.*?)```", top, re.DOTALL)
    assert len(commands) == 2
    assert all(command.count("\n") == 1 for command in commands)
    assert commands[0].endswith("bn-callbacks demo\n")
    assert commands[1] == readme_test_command() + "\n"


def test_ci_extracts_the_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text("utf-8")
    (extraction,) = re.findall(r"^test_command=.*$", script, re.MULTILINE)
    printed = subprocess.run(
        ["bash", "-c", f'{extraction}; printf %s "$test_command"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed == readme_test_command()


def test_core_has_three_dependencies_and_no_tensorflow():
    # Python 3.10 has no tomllib.
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject, re.DOTALL | re.M)
    assert block
    dependencies = re.findall(r'^ *"([\w-]+)>=', block.group(1), re.MULTILINE)
    assert dependencies == ["keras", "numpy", "tensorboard"]
    assert block.group(1).count('"') == 2 * len(dependencies)


def test_one_version_and_day_everywhere():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {__version__}\n" in citation
    (day,) = re.findall(r"^date-released: (\d{4}-\d\d-\d\d)$", citation, re.MULTILINE)
    assert f"\n## [{__version__}] - {day}\n" in (ROOT / "CHANGELOG.md").read_text(
        "utf-8"
    )
    # Whatever else names a version gets it from there.
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    assert not re.search(r"^version =", pyproject, re.MULTILINE)


def test_picture_of_the_house_shows_the_modules_that_exist():
    pictured = pictured_modules((ROOT / "docs/design.md").read_text("utf-8"))
    existing = {name for name in modules() if not name.endswith(".__init__")}
    assert pictured == existing


def test_floors_in_the_docs_are_those_tested():
    design = (ROOT / "docs/design.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", design, re.MULTILINE)
    documented = {int(floor): set(re.findall(r"\w+", rooms)) for floor, rooms in rows}
    assert documented == dict(enumerate(FLOORS))


def test_picture_is_read_with_its_folders():
    picture = "```text\nbn_callbacks/\n  a/     x\n    b.py   y, z.py\n  c.py\n```"
    assert pictured_modules(picture) == {"a.b", "c"}


@pytest.mark.parametrize("module", modules())
def test_imports_run_downwards(module):
    assert room(module) in FLOOR, f"Give {room(module)} a floor in FLOORS"
    assert upward_imports(modules()[module].read_text("utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("statistics.lag", "from bn_callbacks import report"),
        ("statistics.lag", "from ..layers import find"),
        ("layers", "import bn_callbacks.measuring.one_pass as p"),
        ("layers", "from .report import LayerReport"),
        ("layers", "def f():\n    from . import measuring"),
        ("recalibration", "from bn_callbacks import audit"),
        ("callbacks.monitor", "import bn_callbacks"),
        ("callbacks.__init__", "from ..cli import main"),
    ],
)
def test_an_upward_or_level_import_is_found(module, source):
    assert len(upward_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("statistics.lag", "import numpy as np\nfrom .moments import Statistics"),
        ("callbacks.__init__", "from bn_callbacks.callbacks.monitor import M"),
        ("callbacks.monitor", "from .. import layers, report"),
        ("__main__", "from bn_callbacks.cli import main"),
        ("__init__", "from .callbacks import BatchNormMonitor"),
    ],
)
def test_a_downward_or_neighbourly_import_is_allowed(module, source):
    assert upward_imports(source, module) == []


@pytest.mark.parametrize("module", [m for m in modules() if room(m) == "statistics"])
def test_statistics_need_no_framework(module):
    names = imported_names(modules()[module].read_text("utf-8"), module)
    assert {name.split(".")[0] for name in names}.isdisjoint({"keras", "tensorflow"})


@pytest.mark.parametrize("module", [m for m in modules() if room(m) != "layers"])
def test_only_layers_knows_private_keras(module):
    assert private_keras(modules()[module].read_text("utf-8"), module) == []


@pytest.mark.parametrize(
    "source",
    [
        "from keras.src import ops",
        "import keras.src.ops as ops",
        "keras.src.ops.mean(x)",
        "self.model._flatten_layers()",
        "layer._layers",
    ],
)
def test_private_keras_is_found(source):
    assert len(private_keras(source, "report")) == 1


def test_own_private_attributes_are_not_those_of_keras():
    assert private_keras("self._layers = find_layers(model)", "report") == []
