"""Draws the diagonal schedule: python -m scripts.schedule --segments=12 --layers=6 --out=FILE.png.

The picture is made from the phases that the schedule runs. Prints its cells, and what a run that
always advances all layers would evaluate.
"""

from absl import flags

from scripts import common

_SEGMENTS = flags.DEFINE_integer("segments", 12, "Segments.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 6, "Layers.", lower_bound=1)
_PATTERN_LEN = flags.DEFINE_integer("pattern_len", 1, "Layers of a pattern.", lower_bound=1)
_BUCKETS = flags.DEFINE_integer(
    "buckets", 4, "config.model.n_ramp_buckets: widths of a ramp.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", "schedule.png", "Figure to write; its ending sets the format.")


def main(arguments: list[str]) -> None:
    """Draws, prints."""
    del arguments
    from longctx_jax.figures.saving import save
    from longctx_jax.figures.schedule import draw_schedule
    from longctx_jax.models.schedules.diagonal import diagonal_cells

    n_segments, n_layers, pattern_len = _SEGMENTS.value, _LAYERS.value, _PATTERN_LEN.value
    if n_layers % pattern_len:
        raise common.UsageError(
            f"--layers must be a multiple of --pattern_len: got {n_layers} and {pattern_len}"
        )
    sizes = (n_segments, n_layers // pattern_len, pattern_len, _BUCKETS.value)
    save(draw_schedule(*sizes), _OUT.value)
    useful, cells = n_segments * n_layers, diagonal_cells(*sizes)
    padded = (n_segments + n_layers - 1) * n_layers
    print(f"{useful} useful cells, {cells} evaluated ({cells / useful:.2f}), {padded} padded")
    print(f"wrote {_OUT.value}")


if __name__ == "__main__":
    common.run(main)
