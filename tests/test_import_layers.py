"""Who may import whom, read from the sources."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

PROJECT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "longctx_jax"
SOURCES = [
    path
    for folder in ("longctx_jax", "configs", "scripts")
    for path in sorted((PROJECT / folder).rglob("*.py"))
]

# layer -> what it may import of this project, besides COMMON: layers or single modules
ANYTHING = {"longctx_jax"}
COMMON = {
    "longctx_jax.typing",
    "longctx_jax.json_files",
    "longctx_jax.run_files",
    "longctx_jax.units",
}
ALLOWED = {
    "typing": set(),
    "run_files": set(),
    "json_files": set(),
    "units": set(),
    "ops": {"longctx_jax.ops"},
    "nn": {"longctx_jax.ops", "longctx_jax.nn"},
    "models": {"longctx_jax.ops", "longctx_jax.nn", "longctx_jax.models"},
    "data": {"longctx_jax.data"},
    "training": {
        "longctx_jax.training",
        "longctx_jax.models",
        "longctx_jax.nn.contract",
        "longctx_jax.nn.partition",
        "longctx_jax.data",
        "longctx_jax.ops.losses",
    },
    "evaluation": {
        "longctx_jax.evaluation",
        "longctx_jax.models",
        "longctx_jax.nn.contract",
        "longctx_jax.nn.partition",
        "longctx_jax.ops",
        "longctx_jax.data",
    },
    "decoding": {
        "longctx_jax.decoding",
        "longctx_jax.models",
        "longctx_jax.nn.contract",
        "longctx_jax.ops",
        "longctx_jax.data",
    },
    "accounting": {
        "longctx_jax.accounting",
        "longctx_jax.decoding.greedy",
        "longctx_jax.training",
        "longctx_jax.models",
        "longctx_jax.nn",
        "longctx_jax.ops",
    },
    "runs": {
        "longctx_jax.runs",
        "longctx_jax.training",
        "longctx_jax.evaluation",
        "longctx_jax.decoding",
        "longctx_jax.models",
        "longctx_jax.nn.contract",
        "longctx_jax.nn.mixers",
        "longctx_jax.data",
    },
    "benchmarking": ANYTHING,
    "figures": {"longctx_jax.figures", "longctx_jax.models.schedules.diagonal"},
    "faults": ANYTHING,
    "reporting": {
        "longctx_jax.reporting",
        "longctx_jax.figures.curves",
        "longctx_jax.benchmarking.ratios",
        "longctx_jax.benchmarking.rows",
        "longctx_jax.training.metrics",
        "longctx_jax.training.sweep",
    },
    "conversion": {
        "longctx_jax.conversion",
        "longctx_jax.models",
        "longctx_jax.nn.rotary_config",
        "longctx_jax.training.checkpoint",
        "longctx_jax.training.metrics",
        "longctx_jax.training.start",
        "longctx_jax.training.state",
        "longctx_jax.data",
    },
    "configs": {"configs", "longctx_jax.run_files"},
    "scripts": ANYTHING | {"scripts", "configs"},
}
# package -> the only files that may import it
ONLY_IN = {
    "tensorflow_datasets": {"longctx_jax/data/tfds_source.py"},
    "orbax": {"longctx_jax/training/checkpoint.py"},
    "submitit": {"longctx_jax/training/launch.py"},
}
# layer -> packages it may not import, beyond what ONLY_IN says
FORBIDDEN = {
    "typing": {"flax", "optax", "grain", "ml_collections"},
    "run_files": {"jax", "flax", "optax", "numpy", "grain", "ml_collections"},
    "json_files": {"jax", "flax", "optax", "numpy", "grain", "ml_collections"},
    "ops": {"flax", "optax", "grain", "ml_collections"},
    "nn": {"optax", "grain", "ml_collections"},
    "models": {"optax", "grain", "ml_collections"},
    "data": {"flax", "optax"},
    "units": {"jax", "flax", "optax", "numpy", "grain", "ml_collections"},
    "figures": {"jax", "flax", "optax", "orbax", "grain", "ml_collections"},
    "reporting": {"jax", "flax", "optax", "orbax", "grain", "ml_collections"},
    "configs": {"jax", "flax", "optax", "numpy", "grain", "scripts"},
}


def names(path):
    return path.relative_to(PROJECT).as_posix()


def layer_of(path):
    parts = path.relative_to(PROJECT).parts
    if parts[0] != "longctx_jax":
        return parts[0]
    return parts[1].removesuffix(".py")


@functools.cache
def imported(path):
    """Returns every module a file imports, wherever in the file; `from a import b` as "a.b"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{names(path)}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_within(module, parents):
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_imports_respect_the_layers(path):
    layer = layer_of(path)
    if layer == "__init__":
        assert not imported(path), "`import longctx_jax` must load nothing"
        return
    ours = {m for m in imported(path) if is_within(m, {"longctx_jax", "configs", "scripts"})}
    allowed = ALLOWED[layer] | (COMMON if layer != "configs" else set())
    extra = sorted(module for module in ours if not is_within(module, allowed))
    assert not extra, f"{layer} may not import {extra}; it may import {sorted(allowed)}"
    others = sorted(m for m in imported(path) if is_within(m, FORBIDDEN.get(layer, set())))
    assert not others, f"{layer} may not import {others}"


def dotted(path):
    """Returns the module's name as other files import it."""
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in SOURCES}
LOADERS = {"import_module", "leaf", "leaf_unsupported"}  # functions that load what a string names


@functools.cache
def loaded_by_string(path):
    """Returns the modules of this project that a file names in strings and loads by them."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    if not LOADERS & {getattr(f, "id", getattr(f, "attr", "")) for f in calls}:
        return set()
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    texts = {value for value in constants if isinstance(value, str)}
    names = texts | {f"longctx_jax.ops.{text}" for text in texts}
    return {name for name in names if name in MODULES}


def arrows(path):
    """Returns the files of this project that a file imports, or loads by their names."""
    found = set()
    for name in imported(path) | loaded_by_string(path):
        while name and name not in MODULES:  # "a.b.function" -> "a.b"
            name = name.rpartition(".")[0]
        if name and MODULES[name] != path:
            found.add(MODULES[name])
    return found


def circles(graph):
    """Returns the strongly connected parts of two files or more (Tarjan 1972)."""
    index, low, stack, on_stack, found = {}, {}, [], set(), []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        on_stack.add(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in on_stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = []
            while not part or part[-1] != node:
                part.append(stack.pop())
                on_stack.discard(part[-1])
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_imports_run_in_a_circle():
    found = circles({path: arrows(path) for path in SOURCES})
    assert not found, [[names(path) for path in part] for part in found]


def test_circles_are_found():
    assert circles({1: {2}, 2: {3}, 3: {2}, 4: {1}}) == [[2, 3]]
    assert circles({1: {2}, 2: {3}, 3: set()}) == []


def test_no_file_is_longer_than_400_lines():
    lengths = {str(p.relative_to(PROJECT)): p.read_text().count("\n") for p in SOURCES}
    assert {path: n for path, n in lengths.items() if n > 400} == {}


def test_kernels_are_loaded_by_the_dispatchers_of_their_ops_alone():
    kernels = {path for path in SOURCES if path.name.startswith("pallas_")}
    for path in set(SOURCES) - kernels:
        if path.parts[-3] == "ops":
            taken = {p.name for p in arrows(path) & kernels}
            assert not taken or path.name == "select.py", f"{names(path)} loads {sorted(taken)}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_some_packages_have_one_door(package):
    importers = {names(path) for path in SOURCES if is_within_any(path, package)}
    assert importers <= ONLY_IN[package], f"only {ONLY_IN[package]} may import {package}"


def is_within_any(path, package):
    return any(is_within(module, {package}) for module in imported(path))


def test_the_rules_cover_every_folder():
    folders = {layer_of(path) for path in SOURCES} - {"__init__"}
    assert folders <= set(ALLOWED), f"no rule for {sorted(folders - set(ALLOWED))}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("longctx_jax", {"jax", "flax", "numpy", "grain", "optax"}),
        ("configs.base", {"jax", "flax", "numpy", "grain", "optax", "longctx_jax"}),
        ("longctx_jax.ops.attention", {"flax", "optax", "grain", "orbax", "ml_collections"}),
        ("longctx_jax.reporting.report", {"jax", "flax", "optax", "orbax", "grain"}),
        ("longctx_jax.models", {"optax", "grain", "orbax", "tensorflow", "ml_collections"}),
    ],
    ids=["package", "configs", "ops", "reporting", "models"],
)
def test_importing_loads_nothing_heavy(module, unwanted):
    program = f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & unwanted, f"import {module} loads {sorted(loaded & unwanted)}"
