"""Dockerfile, .dockerignore and docs/cluster.md against the project, without a container daemon."""

import fnmatch
import json
import pathlib
import re
import shlex

import pytest
import yaml

PROJECT = pathlib.Path(__file__).resolve().parent.parent
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "VOLUME", "CMD"}


def instructions():
    """Returns (name, rest) of each instruction of the Dockerfile, with its lines joined."""
    lines = (PROJECT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    whole = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in whole if line.strip()]


def rest_of(name):
    return [rest for found, rest in instructions() if found == name]


def is_ignored(path):
    """Whether .dockerignore keeps `path` or its folder from the builder; the last match counts."""
    ignored = False
    above = [path, *map(str, pathlib.PurePosixPath(path).parents)][:-1]
    for line in (PROJECT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            found = any(fnmatch.fnmatch(pathlib.Path(p).name, pattern[3:]) for p in above)
        else:
            found = any(fnmatch.fnmatch(p, pattern) for p in above)
        if found:
            ignored = not line.startswith("!")
    return ignored


def commands(text):
    """Returns the targets of make and the modules of python -m in some shell text."""
    targets = re.findall(r"\bmake ([a-z-]+)(?= |$)", text)
    modules = re.findall(r"python -m ([a-z_.]+)", text)
    return targets, modules


def require_commands(text):
    makefile = (PROJECT / "Makefile").read_text()
    targets, modules = commands(text)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
    for module in modules:
        assert (PROJECT / f"{module.replace('.', '/')}.py").is_file(), f"no module {module}"
    return targets, modules


def test_instructions_are_known_and_begin_with_an_image():
    names = [name for name, _ in instructions()]
    assert set(names) <= INSTRUCTIONS, set(names) - INSTRUCTIONS
    assert next(name for name in names if name != "ARG") == "FROM"
    assert rest_of("FROM") == ["python:${PYTHON_VERSION}-slim"]
    (version,) = re.findall(r"PYTHON_VERSION=(\S+)", " ".join(rest_of("ARG")))
    assert f"Python :: {version}" in (PROJECT / "setup.py").read_text()


def test_what_is_copied_exists_and_reaches_the_builder():
    for rest in rest_of("COPY"):
        *sources, _ = shlex.split(rest)
        for source in sources:
            assert (PROJECT / source).exists(), f"COPY of {source}: there is none"
            assert not is_ignored(source), f"COPY of {source}: .dockerignore leaves it out"
    assert is_ignored(".venv") and is_ignored(".git") and is_ignored("longctx_jax/__pycache__")


def test_the_environment_is_made_from_what_was_copied_before():
    copied = set()
    for name, rest in instructions():
        if name == "RUN" and "make venv" in rest:
            break
        if name == "COPY":
            copied |= set(shlex.split(rest)[:-1])
    assert copied >= {"setup.py", "Makefile", "README.md", "scripts/make_venv.sh"}
    assert "longctx_jax/__init__.py" in copied, "setup.py reads the version there"
    (argument,) = [rest for rest in rest_of("ARG") if rest.startswith("EXTRAS")]
    assert argument == 'EXTRAS=""', "the default is CPU"


def test_commands_exist():
    targets, _ = require_commands("\n".join(rest_of("RUN")))
    assert targets == ["venv"]
    (command,) = map(json.loads, rest_of("CMD"))
    _, modules = require_commands(" ".join(command))
    assert modules == ["scripts.train"]
    (config,) = [part.partition("=")[2] for part in command if part.startswith("--config=")]
    assert (PROJECT / config).is_file()
    assert all(path.startswith("/") for path in json.loads(*rest_of("VOLUME")))


@pytest.fixture(scope="module")
def page():
    return (PROJECT / "docs" / "cluster.md").read_text()


def test_commands_of_the_page_exist(page):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    targets, modules = require_commands(blocks)
    assert "venv" in targets and {"scripts.sweep", "scripts.train"} <= set(modules)
    for path in re.findall(r"=(configs/\S+\.py)", page):
        assert (PROJECT / path).is_file(), path
    for extra in re.findall(r"longctx_jax\[(\w+)\]|EXTRAS=(\w+)", page):
        assert f'"{"".join(extra)}": [' in (PROJECT / "setup.py").read_text()


def test_flags_of_the_page_exist(page):
    source = (PROJECT / "scripts" / "sweep.py").read_text()
    flags = set(re.findall(r"--(slurm_\w+)", page))
    assert len(flags) > 8
    for flag in flags:
        assert f'"{flag}"' in source, f"no flag --{flag}"


def test_the_manifest_is_one_indexed_job_and_its_service(page):
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    service, job = yaml.safe_load_all(text)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    name = service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == name
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (container,) = pod["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["NUM_PROCESSES"] == str(spec["completions"])
    assert values["JAX_COORDINATOR_ADDRESS"].startswith(f"{job['metadata']['name']}-0.{name}:")
    used = set(re.findall(r"\$\((\w+)\)", " ".join(container["args"])))
    assert used == set(values)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
