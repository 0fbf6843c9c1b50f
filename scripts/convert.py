"""Pretrained weights in and out, and from a transformer to another scheme.

    python -m scripts.convert --from=hf_llama --path=DIR --workdir=RUN [--config=configs/NAME.py]
    python -m scripts.convert --to=hf_llama --workdir=RUN --path=DIR [--dtype=bfloat16]
    python -m scripts.convert --to=SCHEME --from=RUN --workdir=NEW [--config.model.field=value ...]

The first reads a LLaMA-family checkpoint into a run, the second writes one, the third initialises
another scheme from the run of a transformer. docs/conversion.md says what maps to what.
"""

import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from longctx_jax import run_files
from scripts import common

DEFAULT_CONFIG = "configs/base.py"
HF_LLAMA = "hf_llama"

CONFIG = common.config_flag(default=DEFAULT_CONFIG)
FROM = flags.DEFINE_string("from", "", "hf_llama, or the folder of a transformer's run.")
TO = flags.DEFINE_string(
    "to", "", "hf_llama, or a scheme: inattention, decay, recurrent_memory, sliding."
)
PATH = flags.DEFINE_string("path", "", "Checkpoint folder, to read or to write.")
WORKDIR = common.workdir_flag("Folder of the run: to write, or with --to=hf_llama to read.")
STEP = flags.DEFINE_integer("step", -1, "Checkpoint of the run that is read; -1 = the newest.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of exported tensors.")
IGNORE_FIELDS = flags.DEFINE_list(
    "ignore_fields", [], "Unknown fields of config.json that change no number, to go on without."
)
SEED = flags.DEFINE_integer("seed", 0, "Of the weights of a scheme that have no counterpart.")


def main(arguments: list[str]) -> None:
    """Converts in the one direction that the flags name; says what was made."""
    del arguments
    from longctx_jax.conversion.schemes import SCHEMES

    workdir, folder = pathlib.Path(WORKDIR.value), pathlib.Path(PATH.value).expanduser()
    if (FROM.value, TO.value) == (HF_LLAMA, "") and PATH.value:
        read_hf_llama(folder, workdir)
    elif (FROM.value, TO.value) == ("", HF_LLAMA) and PATH.value:
        write_hf_llama(folder)
    elif TO.value in SCHEMES and FROM.value not in ("", HF_LLAMA) and not PATH.value:
        change_scheme(TO.value, workdir)
    else:
        raise common.UsageError(
            "a conversion has one direction: --from=hf_llama --path=DIR, --to=hf_llama --path=DIR, "
            f"or --to=SCHEME --from=RUN with a scheme of {list(SCHEMES)}: got "
            f"--from={FROM.value!r} --to={TO.value!r} --path={PATH.value!r}; --helpshort lists the "
            "flags"
        )


def read_hf_llama(folder: pathlib.Path, workdir: pathlib.Path) -> None:
    """Makes a run of a checkpoint folder."""
    from configs import base
    from longctx_jax.conversion import hf_config, hf_llama, runs, tokenizer_files
    from longctx_jax.conversion import safetensors_files as files
    from longctx_jax.models import build_model

    runs.require_new(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--path must be a checkpoint folder: {folder} does not exist; download it first"
        )
    given = files.read_json(folder / "config.json")
    fields = hf_config.model_fields(given, IGNORE_FIELDS.value)
    found = files.find_tensors(folder)
    hf_llama.require_layers(fields["n_layers"], len(found))
    config, overrides = CONFIG.value, _overrides()
    config.model = base.model_config()
    config.model.update(fields)
    config.lock()
    config.update_from_flattened_dict(
        {field: value for field, value in overrides.items() if field.startswith("model.")}
    )
    config.train.ema_decay = 0.0
    model = build_model(config.model, common.mixers())
    hf_llama.require_tensors(model, found)
    tokenizer = tokenizer_files.find_tokenizer(folder)
    if tokenizer and "data.tokenizer" not in overrides:
        _require_tokenizer(tokenizer, config.model.vocab_size)
        tokenizer_files.copy_tokenizer(folder, workdir / run_files.TOKENIZER)
        copied = workdir.absolute() / run_files.TOKENIZER / tokenizer.name
        config.data.tokenizer = str(copied)
    params = hf_llama.to_params(model, lambda name: files.read_float32(found[name], name))
    hf_llama.require_tied(model, params, found)
    runs.write_run(workdir, config, {"params": params, "model_state": {}})
    print(f"wrote {workdir}: {_size(params)} in {len(found)} tensors, step 0")
    print(f"tokenizer: {config.data.tokenizer}")
    print(f"use: python -m scripts.train --config=configs/from_run.py:{workdir} --workdir=NEW")


def write_hf_llama(folder: pathlib.Path) -> None:
    """Writes the run as a checkpoint folder."""
    import ml_dtypes
    import numpy as np

    from longctx_jax.conversion import hf_config, hf_llama, runs, tokenizer_files
    from longctx_jax.conversion import safetensors_files as files
    from longctx_jax.runs.evaluate import eval_cache_len

    if _overrides():
        raise common.UsageError(
            f"--to=hf_llama takes the config of --workdir: got {sorted(_overrides())}; leave the "
            "fields out"
        )
    runs.require_new(folder, "--path")
    run = common.restore_run(WORKDIR.value, STEP.value)
    tokenizer = pathlib.Path(run.config.data.tokenizer)
    given = hf_config.hf_config(
        run.model.config,
        context_len=eval_cache_len(run.config),
        dtype=DTYPE.value,
        **_special_ids(run.config),
    )
    tensors = hf_llama.to_tensors(run.model, run.variables["params"])
    if DTYPE.value == "bfloat16":
        tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    copied = []
    if tokenizer.name in tokenizer_files.TOKENIZERS and tokenizer.is_file():
        copied = tokenizer_files.copy_tokenizer(tokenizer.parent, folder)
    files.write_tensors(folder, tensors)
    run_files.write_json(folder / "config.json", given)
    n_bytes = sum(np.asarray(array).nbytes for array in tensors.values())
    print(f"wrote {folder}: {given['model_type']}, {len(tensors)} tensors, {n_bytes} bytes")
    print(f"tokenizer files: {', '.join(copied) or 'none'}")


def change_scheme(scheme: str, workdir: pathlib.Path) -> None:
    """Makes a run of another scheme from a transformer's."""
    import jax

    from configs import from_run
    from longctx_jax.conversion import runs, schemes
    from longctx_jax.models import build_model

    if config_flags.get_config_filename(flags.FLAGS["config"]) != DEFAULT_CONFIG:
        raise common.UsageError(
            f"--to={scheme} takes the config of --from=RUN: got another file with --config; give "
            "--config.field=value alone"
        )
    runs.require_new(workdir)
    run = common.restore_run(FROM.value, STEP.value)
    config = from_run.get_config(FROM.value)
    fields = schemes.scheme_fields(scheme, run.model.config)
    config.update_from_flattened_dict({f"model.{name}": fields[name] for name in fields})
    config.update_from_flattened_dict(_overrides())
    config.train.init_from, config.train.ema_decay = "", 0.0
    target = build_model(config.model, common.mixers())
    moved = schemes.transfer(run.model.config, run.variables, target, jax.random.key(SEED.value))
    runs.write_run(workdir, config, moved.variables)
    print(f"wrote {workdir}: {_size(moved.variables['params'])}, step 0")
    for what, paths in (
        ("kept", moved.kept),
        ("fresh (no counterpart in the transformer)", moved.fresh),
        ("dropped (no counterpart in the new model)", moved.dropped),
    ):
        print(f"{what}: {len(paths)} arrays")
        print("".join(f"  {path}\n" for path in paths), end="")


def _overrides() -> dict[str, Any]:
    """Returns the fields that --config.field=value set."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def _require_tokenizer(path: pathlib.Path, vocab_size: int) -> None:
    """Raises unless the tokenizer can be used, before anything is written."""
    from longctx_jax import data
    from longctx_jax.data.tokens import check_vocab_size

    try:
        check_vocab_size(data.build_tokenizer(str(path)), vocab_size)
    except (ValueError, ImportError) as error:
        raise type(error)(
            f"{error} (to convert the weights without it, --config.data.tokenizer=bytes)"
        ) from error


def _special_ids(config: Any) -> dict[str, int]:
    """Returns the ids of config.json that begin and end a document, where they are known."""
    from longctx_jax import data

    tokenizer = data.build_tokenizer(config.data.tokenizer, config.data.data_dir)
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.separator_id}
    return {name: index for name, index in ids.items() if index >= 0}


def _size(params: Any) -> str:
    import jax

    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"


if __name__ == "__main__":
    common.run(main)
