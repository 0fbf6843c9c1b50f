"""How a run uses its codebooks: python -m scripts.codebooks --workdir=DIR [--out=FILE.png].

Prints a line a layer: codes in use (perplexity), dead ones, the busiest code's share of the keys,
and the length of codewords, averaged over heads; then one JSON line. With --out, draws the codes of
every layer sorted by use.
"""

import json
from typing import Any

from absl import flags

from scripts import common

_WORKDIR = common.workdir_flag()
_STEP = flags.DEFINE_integer("step", -1, "Checkpoint to read; -1 = the newest.")
_OUT = flags.DEFINE_string("out", "", "Figure to write; its ending sets the format.")


def layer_rows(run: Any) -> list[dict[str, Any]]:
    """Returns a row a layer of the run that has codebooks, in the order of the stack."""
    import numpy as np

    from longctx_jax.models.stack import layer_names, layer_places
    from longctx_jax.ops.vq.codebook import codebook_report

    config = run.model.config
    state = run.variables["model_state"].get("stack", {})
    rows = []
    for name, places in zip(layer_names(config), layer_places(config), strict=True):
        if name not in state:
            continue
        codebook = state[name]["mixer"]["codebook"]
        report = {k: np.asarray(v).mean(-1) for k, v in codebook_report(codebook).items()}
        counts = np.asarray(codebook.counts)
        share = np.sort(counts / np.maximum(counts.sum(-1, keepdims=True), 1e-30))[..., ::-1]
        for i, layer in enumerate(places.tolist()):
            values = {key: round(float(value[i]), 4) for key, value in report.items()}
            busiest = {"largest_share": round(float(share[i, :, 0].mean()), 4)}
            rows.append({"layer": layer, **values, **busiest, "use": share[i].mean(0)})
    return sorted(rows, key=lambda row: row["layer"])


def main(arguments: list[str]) -> None:
    """Reads, prints, draws."""
    del arguments

    rows = layer_rows(common.restore_run(_WORKDIR.value, _STEP.value))
    if not rows:
        raise common.UsageError(
            f"--workdir must be a run whose model has codebooks: {_WORKDIR.value} has none; train "
            "one with --config.model.name=transformer_vq"
        )
    use = {row["layer"]: row.pop("use") for row in rows}
    n_codes = len(use[rows[0]["layer"]])
    for row in rows:
        dead = round(row["dead_fraction"] * n_codes)
        print(
            f"layer {row['layer']:2}: {row['perplexity']:7.1f} of {n_codes} codes in use, "
            f"{dead} dead, the busiest takes {row['largest_share']:.1%}, "
            f"codewords of length {row['codeword_norm']:.2f}"
        )
    if _OUT.value:
        from longctx_jax.figures.codebooks import draw_code_use
        from longctx_jax.figures.saving import save

        save(draw_code_use(use), _OUT.value)
        print(f"wrote {_OUT.value}")
    print(json.dumps({"codes": n_codes, "layers": rows}))


if __name__ == "__main__":
    common.run(main)
