"""The figure of scripts.context."""

import pytest

from longctx_jax.figures.contexts import draw_context_curves


def test_context_figure_has_a_panel_a_text_and_a_line_a_model():
    def row(data, pattern, kind, length):
        return {
            "data": data,
            "pattern": pattern,
            "decay_kind": kind,
            "context_len": length,
            "bits_per_byte": 2.0 + 1 / length,
            "train_seq_len": 16,
        }

    models = [(["softmax"], ""), (["decay"], "gated"), (["decay", "softmax"], "gated")]
    rows = [row(d, *m, n) for d in ("a", "b") for m in models for n in (64, 16)]
    figure = draw_context_curves(rows)
    left, right = figure.axes
    labels = [line.get_label() for line in left.lines]
    assert labels == ["softmax", "decay (gated)", "decay-softmax (gated)", "training window 16"]
    assert list(right.lines[0].get_xdata()) == [16, 64]
    with pytest.raises(ValueError, match="needs rows"):
        draw_context_curves([])


def test_context_figure_tells_options_and_depths_apart_and_joins_seeds():
    def row(model, n_layers, bits, seed=0, **variant):
        shared = {"data": "a", "pattern": ["softmax"], "decay_kind": "", "train_seq_len": 512}
        shared["seed"] = seed
        sizes = {"model": model, "n_layers": n_layers, "n_kv_heads": 2, "context_len": 512}
        return shared | sizes | {"variant": variant, "bits_per_byte": bits}

    rows = [row("transformer", 12, 2.0), row("transformer", 6, 2.1)]
    rows += [row("stagformer", 12, 2.0 + seed, seed, n_stacks=3) for seed in (0, 1)]
    (axes,) = draw_context_curves(rows).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines)[:2] == ["softmax (12 layers)", "softmax (6 layers)"]
    assert list(lines["stagformer, n_stacks=3"].get_ydata()) == [2.5]
    with pytest.raises(ValueError, match="'stagformer, n_stacks=3' has several at 512 tokens"):
        draw_context_curves([*rows, rows[-1]])


def test_context_figure_tells_quantised_models_apart():
    def row(pattern, length, **fields):
        shared = {"data": "a", "pattern": [pattern], "decay_kind": "", "train_seq_len": 512}
        return shared | {"context_len": length, "bits_per_byte": 2.0} | fields

    def vq(size, use_table=True, gate="none"):
        return {"vq_codebook_size": size, "vq_use_table": use_table, "gate": gate}

    models = [vq(128), vq(512), vq(256, use_table=False), vq(512, gate="silu")]
    rows = [row("softmax", n) for n in (512, 8192)]
    rows += [row("vq", n, **model) for model in models for n in (512, 8192)]
    (axes,) = draw_context_curves(rows).axes
    assert [line.get_label() for line in axes.lines][:-1] == [
        "softmax",
        "vq (128 codes)",
        "vq (512 codes)",
        "vq (window only)",
        "vq (512 codes, gated)",
    ]
    assert all(list(line.get_xdata()) == [512, 8192] for line in axes.lines[:-1])


def test_context_figure_shows_positions_of_the_longest_context():
    def row(model, seed, length, edges, bits):
        shared = {"data": "a", "pattern": [model], "decay_kind": "", "train_seq_len": 512}
        positions = {"position_edges": edges, "bits_per_byte_by_position": bits}
        return shared | {"context_len": length, "bits_per_byte": 2.0, "seed": seed} | positions

    rows = [row("decay", seed, 300, [0, 128, 300], [2.0 + seed, 1.0]) for seed in (0, 1)]
    rows += [row("decay", 0, 128, [0, 128], [9.0]), row("rwkv", 0, 256, [0, 128, 256], [3.0, None])]
    old = {"data": "a", "pattern": ["vq"], "decay_kind": "", "train_seq_len": 512}
    rows += [old | {"context_len": 64, "bits_per_byte": 2.0}]  # recorded before positions were
    contexts, positions = draw_context_curves(rows).axes
    assert contexts.get_xlabel() == "context (tokens)"
    assert positions.get_xlabel() == "position, up to (tokens)"
    lines = {line.get_label(): line.get_xydata().tolist() for line in positions.lines}
    assert lines["decay"] == [[128, 2.5], [300, 1.0]]
    assert lines["rwkv"] == [[128, 3.0]]
    assert lines["vq"] == []
