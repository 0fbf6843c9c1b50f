"""What every script shares: the flags `--config`, `--workdir`, `--debug`, and one way to fail.

A mistake of the user (unknown flag or config field, wrong type, missing file, a `ValueError` that
this project raises on purpose) ends with one paragraph on stderr and no traceback; exit code 2 when
the command line is wrong, 1 otherwise. Everything else is a bug and keeps its traceback.
"""

import difflib
import importlib.util
import linecache
import logging as std_logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from scripts import overrides

PROJECT = pathlib.Path(__file__).resolve().parent.parent
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

flags.disclaim_key_flags()  # the flags defined here belong to the script that asks for them

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")
_MIXERS = flags.DEFINE_list(
    "mixers",
    [],
    "Mixers that are not this library's, package.module:NAME each; that code is run. Their fields "
    "are config.model.<kind>: docs/contract.md.",
)
# Raised by our own `raise` statements for what a user can repair (house rules, errors).
_USER_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError)
_CONFIG_ERRORS = (AttributeError, KeyError, ValueError, TypeError)
_PARSE_ERRORS = (flags.Error, OSError, *_CONFIG_ERRORS)


class UsageError(ValueError):
    """The command line itself is wrong; ends the script with exit code 2."""


def config_flag(default: str | None = None) -> flags.FlagHolder[ml_collections.ConfigDict]:
    """Defines `--config=FILE` (with `--config.field=value`) and returns its holder.

    Args:
        default: path of the config file when the flag is absent; None makes the flag required.
    """
    holder = config_flags.DEFINE_config_file(
        "config", default, "Config file, e.g. configs/quickstart.py.", lock_config=True
    )
    flag = flags.FLAGS["config"]
    flag.parser = _WithMixers(flag.parser)
    if default is None:
        flags.mark_flag_as_required("config")
    return holder


def workdir_flag(
    help_text: str = "Folder of the run: checkpoints, metrics, samples.",
) -> flags.FlagHolder[str]:
    """Defines the required flag `--workdir=DIR` and returns its holder."""
    return flags.DEFINE_string("workdir", None, help_text, required=True)


class _WithMixers(flags.ArgumentParser):
    """Gives every config the fields of the mixers that --mixers names, before overrides count."""

    def __init__(self, inner: flags.ArgumentParser):
        self._inner = inner

    def parse(self, argument: str) -> Any:
        """Returns the config of the file `argument`, with fields for outside mixers."""
        return with_mixers(self._inner.parse(argument))

    def flag_type(self) -> str:
        """The type as help texts show it."""
        return self._inner.flag_type()


def with_mixers(config: Any) -> Any:
    """Adds the default fields of the mixers of --mixers to a config, and writes their names down.

    Fields that the config has already, those of a run, stay.
    """
    places = _flag_value(sys.argv, "mixers")
    if not places or not hasattr(config, "model"):
        return config
    from longctx_jax.nn.mixers.outside import default_fields, load_mixers

    mixers, named = load_mixers(places.split(","))
    with config.unlocked():
        for kind, fields in default_fields(mixers).items():
            if kind not in config.model:
                config.model[kind] = ml_collections.ConfigDict(fields)
        config.model.outside_mixers = tuple(dict.fromkeys((*config.model.outside_mixers, *named)))
    return config


def mixers() -> dict[str, Any]:
    """Returns what the words of a pattern mean: the library's mixers and those of --mixers."""
    from longctx_jax.nn.mixers.outside import load_mixers

    return load_mixers(_MIXERS.value)[0]


def restore_run(workdir: str | os.PathLike[str], step: int = -1) -> Any:
    """Returns the run in a folder, restored; see `longctx_jax.runs.restore.restore_run`.

    Raises:
        FileNotFoundError: no run.
    """
    from configs import from_run
    from longctx_jax import data, run_files
    from longctx_jax.runs import restore
    from longctx_jax.training import inputs

    path = pathlib.Path(workdir) / run_files.CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"--workdir must be the folder of a run: {path} does not exist; train one with "
            f"python -m scripts.train --config=configs/quickstart.py --workdir={workdir}"
        )
    config = with_mixers(from_run.read_config(path))
    config.data.tokenizer = inputs.find_tokenizer(
        pathlib.Path(workdir),
        config.data.tokenizer,
        lambda name: data.build_tokenizer(name, config.data.data_dir).identity,
    )
    return restore.restore_run(workdir, config, step, mixers())


def run(main: Callable[[list[str]], int | None], *, accept_args: bool = False) -> None:
    """Parses the flags, calls `main(arguments)` and exits; never returns.

    Args:
        main: gets the positional arguments (without the program's name); returns the exit code,
            None for 0.
        accept_args: whether positional arguments are allowed; otherwise one is a usage error.
    """

    def checked_main(argv: list[str]) -> int | None:
        arguments = argv[1:]
        try:
            if arguments and not accept_args:
                raise UsageError(
                    f"this script takes flags only: got {' '.join(arguments)!r}; "
                    "write --name=value, and quote values with spaces"
                )
            return main(arguments)
        except KeyboardInterrupt:
            _fail("interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            if _debug_wanted() or not is_user_error(error):
                raise
            code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
            _fail(error_text(error), code)

    logging.get_absl_handler().addFilter(_is_worth_showing)
    app.run(checked_main, flags_parser=_parse_flags)


def _is_worth_showing(record: Any) -> bool:
    """Drops what libraries log about things that go well: dozens of lines a checkpoint."""
    least = {"orbax": std_logging.ERROR, "xla_bridge.py": std_logging.WARNING}
    return all(record.levelno >= n for name, n in least.items() if name in record.pathname)


def is_user_error(error: BaseException) -> bool:
    """Whether `error` was raised for the user to repair, rather than by a bug.

    File errors are. Value, type, import and not-implemented errors are when the innermost frame is
    a `raise` statement of this project: that is where a message names rule, value and remedy. The
    same types coming out of jax, numpy or an unplanned expression are bugs.
    """
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    where = pathlib.Path(frames[-1].filename)
    if not isinstance(error, _USER_ERRORS) or not _is_ours(where):
        return False
    line = linecache.getline(str(where), frames[-1].lineno or 0)
    return re.search(r"(^|:)\s*raise\b", line) is not None


def error_text(error: BaseException) -> str:
    """The message of `error` as one paragraph."""
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # str(KeyError) would add quotes
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{(error.strerror or type(error).__name__).lower()}: {error.filename}"
    else:
        text = str(error)
    # ml_collections puts a whole traceback into the message of a failing config file.
    if "Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def load_module(path: str, what: str) -> Any:
    """Imports the Python file at `path` and returns the module.

    Args:
        path: of the file, relative to the current folder or absolute.
        what: what the file is, for the error message ("sweep file").

    Raises:
        FileNotFoundError: if there is no such file; names the closest ones.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(_missing_file_text(path, what))
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"a {what} must be a Python file: got {path!r}; name a .py file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(path: str) -> ml_collections.ConfigDict:
    """The config that the file at `path` (`file.py` or `file.py:argument`) describes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no `get_config`, or assigns a field or type that the schema lacks.
    """
    name, _, argument = path.partition(":")
    module = load_module(name, "config file")
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"a config file must define get_config(): {name} does not; add the function"
        )
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except _CONFIG_ERRORS as error:
        raise ValueError(
            f"config file {name} fails: {type(error).__name__}: {error_text(error)}"
        ) from error
    return with_mixers(config)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Absl's flag parser with this module's error messages."""
    try:
        _require_config_file(argv)
        return flags.FLAGS(list(argv))
    except _PARSE_ERRORS as error:
        if "--debug" in argv:
            raise
        missing = isinstance(error, FileNotFoundError)
        _fail(_parse_error_text(error, argv), EXIT_FAILED if missing else EXIT_USAGE)


def _parse_error_text(error: Exception, argv: Sequence[str]) -> str:
    """Names the field, the value and the remedy where an override is at fault."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return (
            f"unknown flag: got --{error.flagname}; "
            f"{_did_you_mean(error.flagname, flags.FLAGS)}--helpshort lists the flags"
        )
    if "must have a value other than None" in str(error):
        name = str(error).split("Flag --")[1].split(" ")[0]
        return f"--{name} is required: got none; {_flag_help(name)}"
    path = _flag_value(argv, "config")
    if path and not isinstance(error, FileNotFoundError):
        try:
            config = load_config(path)
        except (ValueError, OSError) as cause:  # the file itself is broken: that is the message
            return error_text(cause)
        for field, value in _overrides(argv):
            problem = overrides.override_problem(config, field, value)
            if problem:
                return problem
    text = error_text(error)
    return text if isinstance(error, OSError) else f"{text}; --helpshort lists the flags"


def _overrides(argv: Sequence[str]) -> Iterable[tuple[str, str]]:
    """The (field, value) pairs of `--config.field=value` and `--config.field value`."""
    for index, argument in enumerate(argv):
        match = re.match(r"--?config\.([^=]+)(=?)(.*)$", argument, re.DOTALL)
        if match:
            field, equals, value = match.groups()
            following = argv[index + 1] if index + 1 < len(argv) else ""
            yield field, value if equals else following if not following.startswith("-") else "true"


def _flag_value(argv: Sequence[str], name: str) -> str:
    """The last value of `--name=value` or `--name value` in `argv`; "" if absent."""
    found = ""
    for index, argument in enumerate(argv):
        match = re.match(rf"--?{name}(=(.*))?$", argument, re.DOTALL)
        if match:
            following = argv[index + 1] if index + 1 < len(argv) else ""
            found = match.group(2) if match.group(1) else following
    return found


def _require_config_file(argv: Sequence[str]) -> None:
    """Fails on a missing config file now: ml_collections would only do so at first use."""
    path = _flag_value(argv, "config").partition(":")[0]
    if "config" in flags.FLAGS and path and not os.path.isfile(path):
        raise FileNotFoundError(_missing_file_text(path, "config file"))


def _missing_file_text(path: str, what: str) -> str:
    folder = pathlib.Path(path).parent
    near = (
        sorted(str(p) for p in folder.glob("*.py") if p.name != "__init__.py")
        if folder.is_dir()
        else []
    )
    if not near:
        hint = "run from the project's root, or give an absolute path"
    else:
        hint = (
            _did_you_mean(path, near)
            + f"{folder} has {', '.join(pathlib.Path(p).name for p in near)}"
        )
    return f"the {what} must exist: got {path}; {hint}"


def _did_you_mean(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f"did you mean {close[0]}? " if close else ""


def _flag_help(name: str) -> str:
    return f"give --{name}=...: {flags.FLAGS[name].help}"


def _is_ours(path: pathlib.Path) -> bool:
    """Whether `path` belongs to this project rather than to an installed package."""
    resolved = path.resolve()
    return resolved.is_relative_to(PROJECT) and "site-packages" not in resolved.parts


def _debug_wanted() -> bool:
    return flags.FLAGS.is_parsed() and _DEBUG.value


def _fail(text: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)
