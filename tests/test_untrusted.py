"""No module of the project can run what it reads: from the sources."""

import ast
import pathlib

import pytest

from longctx_jax import json_files

PROJECT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for folder in ("longctx_jax", "configs", "scripts")
    for path in sorted((PROJECT / folder).rglob("*.py"))
]
# They run code in what they read, or (tarfile, shutil) write where it says.
MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "tarfile", "code"}
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "yaml.load": "yaml.safe_load",
    "yaml.unsafe_load": "yaml.safe_load",
    "yaml.full_load": "yaml.safe_load",
    "shutil.unpack_archive": "zipfile, one known member",
    "torch.load": "safetensors",
    "os.system": "subprocess.run of a list",
}
METHODS = {"extract", "extractall", "exec_module"}
# Config and sweep files are code by design, and named by the user on the command line.
SANCTIONED = {("scripts/common.py", "exec_module")}


def called(node):
    """Returns what a call calls as written, `a.b.c`; "" for anything but names."""
    parts = []
    function = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join(reversed([*parts, function.id])) if isinstance(function, ast.Name) else ""


def problems(source):
    """Returns (line, what) for everything in a source that may run or place what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [(node.lineno, m) for m in modules if m.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        last = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if name in NAMES or name in CALLS or (last in METHODS and last != name):
            found.append((node.lineno, last))
        keywords = {k.arg: k.value for k in node.keywords}
        if name in ("np.load", "numpy.load", "jnp.load"):
            value = keywords.get("allow_pickle")
            if not (isinstance(value, ast.Constant) and value.value is False):
                found.append((node.lineno, "load without allow_pickle=False"))
        shell = keywords.get("shell")
        if isinstance(shell, ast.Constant) and shell.value:
            found.append((node.lineno, "shell=True"))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_nothing_that_is_read_is_run(path):
    name = path.relative_to(PROJECT).as_posix()
    found = [p for p in problems(path.read_text()) if (name, p[1]) not in SANCTIONED]
    assert not found, f"{name} may run or place what it reads: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import a, marshal as m",
        "eval('1')",
        "exec(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "zipfile.ZipFile(path).extractall(folder)",
        "spec.loader.exec_module(module)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_each_way_is_seen(source):
    assert problems(source)


@pytest.mark.parametrize(
    "source",
    ["np.load(path, allow_pickle=False)", "yaml.safe_load(text)", "model.eval()", "re.compile(x)"],
)
def test_harmless_calls_are_not(source):
    assert not problems(source)


def test_only_the_config_loader_is_sanctioned():
    for name, what in SANCTIONED:
        assert what in {found for _, found in problems((PROJECT / name).read_text())}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"[]", "must hold a JSON object: it holds a list"),
        (b"\xff", "must be JSON: it cannot be read"),
        (b"[" * 100_000, "must be JSON: it cannot be read"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "must be JSON of at most 100 levels"),
        (b'{"a": ' + b"1" * 5000 + b"}", "must be JSON: it cannot be read"),
        (b"{" + b" " * 100 + b"}", "must be at most 90 bytes: it has 102"),
    ],
    ids=["list", "bytes", "deep", "deeper than allowed", "digits", "size"],
)
def test_json_that_is_refused_names_file_and_remedy(tmp_path, raw, text):
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    limit = 90 if text.startswith("must be at most 90") else json_files.MAX_BYTES
    with pytest.raises(ValueError, match=f"{path} {text}") as error:
        json_files.read_object(path, remedy="mend it", max_bytes=limit)
    assert str(error.value).endswith("; mend it")


def test_json_as_deep_as_allowed(tmp_path):
    raw = b'{"a":' * 100 + b"1" + b"}" * 100
    assert json_files.parse_object(raw, "x", remedy="")


def test_what_is_no_file_is_not_opened(tmp_path):
    with pytest.raises(ValueError, match="must be a file: it is a folder or a device"):
        json_files.read_object(tmp_path, remedy="r")
    with pytest.raises(ValueError, match="must be a file"):
        json_files.read_object("/dev/zero", remedy="r")
    with pytest.raises(FileNotFoundError):
        json_files.read_object(tmp_path / "none", remedy="r")
