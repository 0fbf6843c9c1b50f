"""Run folders as training leaves them, made of a few numbers."""

import json

import pytest


def make_run(folder, *, model="decay", n_steps=40, bits=3.0, is_bytes=True, **fields):
    """Writes a finished run; `fields` are further config fields by dotted name."""
    folder.mkdir(parents=True)
    config = {"model": {"name": model, "d_model": 64}, "train": {"n_steps": n_steps, "seed": 0}}
    for name, value in fields.items():
        group, _, leaf = name.partition("__")
        config[group][leaf] = value
    records = []
    for step in range(10, n_steps + 1, 10):
        loss = bits + 10 / step
        record = {"step": step, "loss": loss, "tokens": 100.0 * step, "seconds": 2.0 * step}
        record |= {"tokens_per_s": 50.0 + (step == 10), "learning_rate": None}
        records.append(record | ({"bits_per_byte": loss} if is_bytes else {}))
    result = {"bits_per_byte": bits, "nats_per_token": bits * 0.7}
    records.append({"step": n_steps} | {f"eval/{name}": value for name, value in result.items()})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    done = {"step": n_steps, "is_finished": True, "eval": {"split": "validation", **result}}
    (folder / "DONE.json").write_text(json.dumps(done))
    return folder


@pytest.fixture
def run_maker():
    return make_run
