"""The report as one HTML page: sections of tables and charts, each only where there is content."""

import string
from collections.abc import Iterable, Sequence

from longctx_jax.reporting import assets, charts, contexts, sweeps, tables
from longctx_jax.reporting.markup import Html, breakable, element, join, run_link, swatch, table
from longctx_jax.reporting.runs import Run, Sample

MAX_CHARTS = 4  # of memory metrics, and of texts by context length


def render(runs: Sequence[Run], made_at: str, n_left_out: int = 0) -> str:
    """The page about `runs`.

    Args:
        runs: at least one.
        made_at: date and time, for the head.
        n_left_out: runs that matched and are not here.
    """
    sections = {
        "Summary": _summary(runs),
        "Curves": _curves(runs),
        "Throughput": _throughput(runs),
        "Context length": _contexts(runs),
        "Memory": _memory(runs),
        "Sweeps": _sweeps(runs),
        "Differences between configs": _differences(runs),
        "Samples": _samples(runs),
        "Stalls and step times": table(tables.stalls(runs), _names(runs)),
        "Runs": _details(runs),
    }
    filled = {title: content for title, content in sections.items() if content}
    links = [element("a", title, href=f"#{_anchor(title)}") for title in filled]
    counts = f"{len(runs)} run{'s' * (len(runs) > 1)}; made {made_at}"
    if n_left_out:
        counts += f"; {n_left_out} more matched and are left out"
    body = join(
        element("h1", "Training runs"),
        element("div", counts, class_="faint"),
        element("nav", *links),
        *(
            element("section", element("h2", title), content, id=_anchor(title))
            for title, content in filled.items()
        ),
    )
    return string.Template(assets.PAGE).substitute(
        policy=assets.policy(),
        title=join(f"{len(runs)} training runs" if len(runs) > 1 else runs[0].name),
        style=assets.STYLE,
        run_style=_run_style(len(runs)),
        body=body,
        script=assets.SCRIPT,
    )


def _summary(runs: Sequence[Run]) -> Html:
    damaged = [
        join(run_link(i, run.name), ": ", "; ".join(run.notes))
        for i, run in enumerate(runs)
        if run.notes
    ]
    return join(table(tables.summary(runs), _names(runs)), _notes(damaged))


def _curves(runs: Sequence[Run]) -> Html:
    figures = []
    for y, title in (
        ("bits_per_byte", "Bits per byte"),
        ("loss", "Loss, tokens that are not bytes"),
    ):
        for x, against in (("step", "steps"), ("tokens", "tokens"), ("seconds", "training time")):
            size = charts.WIDE if x == "step" else charts.HALF
            chart = charts.training_chart(runs, x, y, size)
            figures.append(_figure(chart, f"{title} by {against}", is_wide=x == "step"))
    if not any(figures):
        return Html("")
    told = "Dots are evaluations on the held-out split; training is drawn light."
    return join(element("p", told), _legend(runs), element("div", *figures, class_="charts"))


def _throughput(runs: Sequence[Run]) -> Html:
    pairs = (("seconds", "training time"), ("step", "steps"))
    return _grid(
        _figure(charts.metric_chart(runs, x, "tokens_per_s", charts.HALF), f"Tokens/s by {against}")
        for x, against in pairs
    )


def _contexts(runs: Sequence[Run]) -> Html:
    curves = contexts.context_curves(runs)
    if not curves:
        return Html("")
    texts = dict.fromkeys(curve.text for curve in curves)
    colors = [len(runs) + i if c.run is None else c.run for i, c in enumerate(curves)]
    figures = []
    for text in list(texts)[:MAX_CHARTS]:
        chosen = [
            (curve, color)
            for curve, color in zip(curves, colors, strict=True)
            if curve.text == text
        ]
        figures.append(_figure(charts.context_chart(chosen, charts.HALF), text))
    legend = [
        element("span", swatch(color), curve.model)
        for curve, color in zip(curves, colors, strict=True)
        if curve.run is None
    ]
    told = "Bits per byte by the most tokens a model could look back on (scripts.context)."
    return join(
        element("p", told),
        element("div", *legend, class_="legend") if legend else Html(""),
        _grid(figures),
        table(contexts.context_table(curves), _names(runs)),
    )


def _memory(runs: Sequence[Run]) -> Html:
    content = tables.memory(runs)
    names = dict.fromkeys(name for run in runs for record in run.records for name in record)
    chosen = [name for name in names if tables.is_memory(name)][:MAX_CHARTS]
    figures = [
        _figure(charts.metric_chart(runs, "step", name, charts.HALF), f"{name} by steps")
        for name in chosen
    ]
    return join(_grid(figures), table(content, _names(runs)))


def _sweeps(runs: Sequence[Run]) -> Html:
    told = "Planned runs by what varies, best first; a value that is no flag is the config's."
    parts = [
        join(element("h3", name), table(content, _names(runs)))
        for name, content in sweeps.sweep_tables(runs)
    ]
    return join(element("p", told), *parts) if parts else Html("")


def _differences(runs: Sequence[Run]) -> Html:
    return table(tables.config_differences(runs), _names(runs))


def _samples(runs: Sequence[Run]) -> Html:
    return join(
        *(
            element(
                "details",
                element("summary", run_link(i, run.name), f": {len(run.samples)} samples"),
                *(_sample(sample) for sample in reversed(run.samples)),
            )
            for i, run in enumerate(runs)
            if run.samples
        )
    )


def _sample(sample: Sample) -> Html:
    text = element("pre", element("b", sample.prompt), sample.text)
    return join(element("div", f"step {sample.step:,}", class_="faint"), text)


def _details(runs: Sequence[Run]) -> Html:
    return join(
        *(
            element(
                "details",
                element("summary", swatch(i), element("b", str(i + 1)), " ", breakable(run.name)),
                _notes(run.notes),
                element("p", str(run.folder)),
                table(tables.last_metrics(run), _names(runs)),
                table(tables.settings(run), _names(runs)),
                id=f"details-{i}",
            )
            for i, run in enumerate(runs)
        )
    )


def _notes(notes: Sequence[str]) -> Html:
    return element("ul", *(element("li", n) for n in notes), class_="notes") if notes else Html("")


def _legend(runs: Sequence[Run]) -> Html:
    """The runs with their lines; unticking one hides its lines in all charts."""
    entries = [
        element(
            "label",
            element("input", type="checkbox", checked="", id=f"show-{i}"),
            swatch(i),
            element("b", str(i + 1)),
            " ",
            breakable(run.name),
        )
        for i, run in enumerate(runs)
    ]
    return element("div", *entries, class_="legend")


def _run_style(n_runs: int) -> str:
    rule = "body:has(#show-{0}:not(:checked)) figure .run-{0} {{ display: none; }}\n"
    return "".join(rule.format(i) for i in range(n_runs))


def _grid(figures: Iterable[Html]) -> Html:
    filled = [figure for figure in figures if figure]
    return element("div", *filled, class_="charts") if filled else Html("")


def _figure(chart: str, caption: str, is_wide: bool = False) -> Html:
    if not chart:
        return Html("")
    kind = {"class_": "wide"} if is_wide else {}
    return element("figure", element("figcaption", caption), Html(chart), **kind)


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
