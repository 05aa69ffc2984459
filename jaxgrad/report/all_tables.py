"""The tables of a report, in the paper's arrangement: models and settings down, projections across."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from scipy.stats import false_discovery_control

from jaxgrad.analysis import Contrast, Interval
from jaxgrad.analysis.curves import SEGMENTS
from jaxgrad.projections import PARTNER_PAIRS
from jaxgrad.report.cells import Cell, file_stem
from jaxgrad.report.comparisons import NORM, CellCurves, Comparison, Report
from jaxgrad.report.style import loss_words
from jaxgrad.report.tables import NOTHING, Column, Number, Table, Value
from jaxgrad.report.verdicts import verdict_of
from jaxgrad.results.losses import RESPONSE_MEAN

_ROLE = (Column("model"), Column("data"), Column("response"), Column("setting"))
_COMPARED = tuple(map(Column, ("model", "data", "response", "first", "second")))
_COMPARED_RESPONSES = tuple(map(Column, ("model", "data", "setting", "first", "second")))


def all_tables(report: Report) -> list[Table]:
    """Every table that has a row, in the order in which they are read."""
    tables = [_counts(report)]
    for data in report.data_sets():
        curves = [c for c in report.curves if c.cell.role.data == data]
        tables += [_mad(data, curves, report.resampling.level), _segment_mad(data, curves)]
    tables += [_means(report), _settings(report), _length(report, "setting"), _responses(report)]
    tables += [_length(report, "response")]
    tables += [_models(report), _more_statistics(report), _similarity(report)]
    return [table for table in tables if table.rows]


def _role(cell: Cell) -> tuple[Value, ...]:
    role = cell.role
    return role.model, role.data or NOTHING, role.response, role.setting


def _each(interval: Interval | None, count: int) -> list[Number]:
    """The components [P] of an interval; nothing where there is none."""
    if interval is None:
        return [Number(np.nan)] * count
    return [
        Number(float(value), float(low), float(high))
        for value, low, high in zip(
            interval.estimate.ravel(), interval.low.ravel(), interval.high.ravel(), strict=True
        )
    ]


def _projections(curves: Sequence[CellCurves]) -> tuple[str, ...]:
    """Those of all cells, in order of appearance."""
    return tuple(dict.fromkeys(p for c in curves for p in c.cell.examples.projections))


def _spread(values: Sequence[Number], of: Sequence[str], over: Sequence[str]) -> list[Number]:
    """Values of the projections `of`, laid out over the columns `over`."""
    known = dict(zip(of, values, strict=True))
    return [known.get(name, Number(np.nan)) for name in over]


def _counts(report: Report) -> Table:
    rows = []
    for cell in report.cells:
        examples = cell.examples
        truncated = np.nan if examples.num_truncated is None else examples.num_truncated
        tokens = examples.response_tokens[np.isfinite(examples.response_tokens)]
        rows.append(
            (
                *_role(cell),
                Number(examples.num_examples, form="count"),
                Number(len(examples.left_out), form="count"),
                "; ".join(f"{n} x {why}" for why, n in examples.reasons().items()) or NOTHING,
                Number(truncated, form="count"),
                Number(float(np.median(tokens)) if len(tokens) else np.nan, form="count"),
                Number(float(examples.loss.mean())),
            )
        )
    names = ("used", "left out", "why", "truncated", "median response tokens", "mean loss")
    unit = loss_words(report.loss_name).unit
    loss = f"in {unit}" if unit else report.loss_name
    return Table(
        "examples",
        "Examples used and left out",
        "Truncated examples are used, cut at max_length; their response may have lost its end. "
        f"The loss is {loss}.",
        (*_ROLE, *map(Column, names)),
        tuple(rows),
    )


def _mad(data: str, curves: Sequence[CellCurves], level: float) -> Table:
    over = _projections(curves)
    rows = []
    for c in curves:
        found = c.descriptions[NORM]
        of = c.cell.examples.projections
        means = _spread(_each(found.mean_P, len(of)), of, over)
        mads = _spread(_each(found.mad_P, len(of)), of, over)
        rows.append((*_role(c.cell), *mads, *means))
    return Table(
        _name("mad", data),
        _title("MAD of the nuclear norm", data),
        "MAD: mean absolute difference of the mean curve from layer to layer, over all layers. Mean: "
        f"over examples and layers. In brackets the {100 * level:g} % bootstrap interval; that of MAD "
        "takes off what noise adds to absolute values, so that an estimate may lie above its own "
        "interval.",
        (
            *_ROLE,
            *(Column(p, "MAD, all layers") for p in over),
            *(Column(p, "mean nuclear norm") for p in over),
        ),
        tuple(rows),
    )


def _segment_mad(data: str, curves: Sequence[CellCurves]) -> Table:
    over = _projections(curves)
    rows = []
    for c in curves:
        found = c.descriptions[NORM].segment_mad_3P
        if found is None:
            continue
        of = c.cell.examples.projections
        numbers = _each(found, 3 * len(of))
        parts = [numbers[k * len(of) : (k + 1) * len(of)] for k in range(3)]
        rows.append((*_role(c.cell), *(n for part in parts for n in _spread(part, of, over))))
    return Table(
        _name("mad_segments", data),
        _title("MAD of the nuclear norm by segment", data),
        "MAD over the early, middle and last layers; a step across a boundary belongs to none. "
        "Intervals as for all layers.",
        (*_ROLE, *(Column(p, segment) for segment in SEGMENTS for p in over)),
        tuple(rows),
    )


def _means(report: Report) -> Table:
    over = _projections(report.curves)
    rows = []
    for c in report.curves:
        of = c.cell.examples.projections
        for name, found in c.descriptions.items():
            numbers = _spread(_each(found.mean_P, len(of)), of, over)
            mads = _spread(_each(found.mad_P, len(of)), of, over)
            rows.append((*_role(c.cell), report.statistics[name].title, *numbers, *mads))
    return Table(
        "statistics",
        "All statistics",
        "Mean over examples and layers, and MAD over all layers, of every statistic, with bootstrap "
        "intervals.",
        (
            *_ROLE,
            Column("statistic"),
            *(Column(p, "mean") for p in over),
            *(Column(p, "MAD") for p in over),
        ),
        tuple(rows),
    )


def _of_kind(report: Report, kind: str) -> list[Comparison]:
    return [c for c in report.comparisons if c.kind == kind]


def _contrast_numbers(contrast: Contrast, p: int) -> list[Number]:
    """What every table of comparisons has of one projection: ratio, MAD difference, AUC, pairs, p."""
    return [
        _each(contrast.ratio_P, 0)[p],
        _each(contrast.mad_difference_P, p + 1)[p],
        _each(contrast.chance_smaller_P, 0)[p],
        Number(contrast.sign_flip.num_pairs, form="count"),
        Number(float(contrast.sign_flip.p_P[p]), form="p"),
    ]


_CONTRAST_COLUMNS = ("ratio", "MAD difference", "AUC", "pairs", "p", "p, FDR")


def _with_fdr(rows: list[tuple[Value, ...]]) -> tuple[tuple[Value, ...], ...]:
    """Adds Benjamini & Hochberg's adjusted p to rows that end in p."""
    found = [row[-1].value if isinstance(row[-1], Number) else np.nan for row in rows]
    p = np.array(found, np.float64)
    adjusted = np.full_like(p, np.nan)
    known = np.isfinite(p)
    if known.any():
        adjusted[known] = false_discovery_control(p[known], method="bh")
    return tuple((*row, Number(float(q), form="p")) for row, q in zip(rows, adjusted, strict=True))


def _settings(report: Report) -> Table:
    rows: list[tuple[Value, ...]] = [
        (*_compared(c), p, *_contrast_numbers(c.contrasts[NORM], k))
        for c, k, p in _by_projection(_of_kind(report, "setting"))
    ]
    return Table(
        "settings",
        "Settings compared: nuclear norm",
        "Ratio: mean of the second over mean of the first. MAD difference: second minus first. AUC: "
        "the chance that a random example of the second has a smaller norm than one of the first. "
        "p: paired sign flips over the instructions that stand in both; FDR: adjusted for the number "
        "of rows (Benjamini and Hochberg).",
        (*_COMPARED, Column("projection"), *map(Column, _CONTRAST_COLUMNS)),
        _with_fdr(rows),
    )


def _length(report: Report, kind: Literal["setting", "response"]) -> Table:
    rows = []
    for c, k, p in _by_projection(_of_kind(report, kind)):
        verdict = verdict_of(c, k)
        ratios = [_ratio(c.summed, k), _ratio(c.matched, k)]
        pairs = np.nan if c.match is None else len(c.match.pairs)
        adjusted, overlap = Number(np.nan), np.nan
        if c.regression is not None:
            adjusted = _each(c.regression.adjusted_ratio, 0)[k]
            overlap = c.regression.overlap
        fraction = _ratio(c.contrasts.get("effective_rank_fraction"), k)
        rows.append(
            (
                *(*_compared(c), p, _ratio(c.contrasts[NORM], k)),
                *(ratios[0], verdict.sum_loss, ratios[1], Number(pairs, form="count")),
                *(verdict.matched, adjusted, Number(overlap, form="percent"), verdict.regression),
                *(_ratio(c.contrasts.get("effective_rank"), k), fraction),
            )
        )
    controls = (
        *(Column("ratio", "sum of the loss"), Column("so the contrast", "sum of the loss")),
        *(Column(n, "matched on length") for n in ("ratio", "pairs", "so the contrast")),
        *(Column(n, "regression on log length") for n in ("ratio", "overlap", "so the contrast")),
        *(Column(n, "effective rank") for n in ("ratio", "ratio, of its ceiling")),
    )
    settings, is_mean = kind == "setting", report.loss_name == RESPONSE_MEAN
    return Table(
        "length" if settings else "length_responses",
        f"{'Settings compared' if settings else 'Correct and irrelevant responses'}: what length does",
        "Each ratio is of mean nuclear norms, second over first. A contrast stands under a control "
        "that gives the same direction with an interval apart from no difference, is not shown by one "
        "whose interval holds no difference, and turns round under one that gives the other direction. "
        "Overlap: examples whose length is within the other set's range. Fewer than 20 pairs, "
        "or examples within it, decide nothing.",
        (
            *(_COMPARED if settings else _COMPARED_RESPONSES),
            Column("projection"),
            Column("ratio", "mean of the loss" if is_mean else "as measured"),
            *controls,
        ),
        tuple(rows),
    )


def _responses(report: Report) -> Table:
    rows: list[tuple[Value, ...]] = []
    for c, k, p in _by_projection(_of_kind(report, "response")):
        found = c.contrasts[NORM]
        layers = found.first.examples.layers
        largest = ", ".join(str(layers[place]) for place in found.largest[:, k])
        leak, without = c.leakage, None if c.leakage is None else c.leakage.without
        leaked = np.nan if leak is None else leak.num_leaked
        kept: list[Value] = [Number(np.nan)] * 3
        if without is not None:
            kept = [
                _each(without.mean_absolute_rd_P, 0)[k],
                _ratio(without, k),
                Number(float(without.sign_flip.p_P[k]), form="p"),
            ]
        role = c.first.role
        about: tuple[Value, ...] = (role.model, role.data or NOTHING, role.setting, p)
        rows.append(
            (
                *about,
                _each(found.mean_absolute_rd_P, 0)[k],
                largest,
                Number(leaked, form="count"),
                *kept,
                *_contrast_numbers(found, k),
            )
        )
    return Table(
        "responses",
        "Correct and irrelevant responses: nuclear norm",
        "RD: relative difference of the mean curves by layer, irrelevant against correct. Leaked: pairs "
        "whose irrelevant response is the correct one after all. Other columns as in the table of "
        "settings.",
        (
            *map(Column, ("model", "data", "setting", "projection", "mean |RD|", "largest layers")),
            *(Column(n, "without leaked pairs") for n in ("leaked", "mean |RD|", "ratio", "p")),
            *(Column(n, "all pairs") for n in _CONTRAST_COLUMNS),
        ),
        _with_fdr(rows),
    )


def _models(report: Report) -> Table:
    rows: list[tuple[Value, ...]] = []
    for c, k, p in _by_projection(_of_kind(report, "model")):
        role = c.first.role
        rows.append(
            (
                role.model,
                c.second.role.model,
                role.data or NOTHING,
                role.response,
                role.setting,
                p,
                *_contrast_numbers(c.contrasts[NORM], k),
            )
        )
    names = ("first", "second", "data", "response", "setting", "projection", *_CONTRAST_COLUMNS)
    return Table(
        "models",
        "Base and instruction-tuned models: nuclear norm",
        "Columns as in the table of settings.",
        tuple(map(Column, names)),
        _with_fdr(rows),
    )


def _more_statistics(report: Report) -> Table:
    """The comparisons by the statistics that were asked for besides the default ones."""
    rows: list[tuple[Value, ...]] = []
    for c in report.comparisons:
        for one in report.more_statistics:
            found = c.contrasts.get(one.name)
            if found is None:
                continue
            for k, p in enumerate(found.first.examples.projections):
                role = c.first.role
                rows.append((role.model, c.title, one.title, p, *_contrast_numbers(found, k)))
    names = ("model", "compared", "statistic", "projection", *_CONTRAST_COLUMNS)
    return Table(
        "more_statistics",
        "Comparisons by other statistics",
        "Columns as in the table of settings. "
        + " ".join(statistic.about for statistic in report.more_statistics),
        tuple(map(Column, names)),
        _with_fdr(rows),
    )


def _similarity(report: Report) -> Table:
    rows = []
    over = _projections(report.curves)
    for cell in report.cells:
        found = cell.similarity
        if found is None:
            continue
        partners = [Number(np.nan)] * len(PARTNER_PAIRS)
        if found.partner_L2 is not None:
            partners = [Number(float(x)) for x in found.partner_L2.estimate.mean(axis=0)]
        neighbours = [Number(np.nan)] * len(over)
        if found.adjacent_LP is not None:
            means = [Number(float(x)) for x in found.adjacent_LP.estimate.mean(axis=0)]
            neighbours = _spread(means, found.projections, over)
        rows.append((*_role(cell), *partners, *neighbours))
    return Table(
        "similarity",
        "Similarity of gradients",
        "Cosine between flattened gradients, mean over examples and layers: of two projections of one "
        "layer, and of one projection in neighbouring layers.",
        (
            *_ROLE,
            *(Column(f"{a} · {b}", "same layer") for a, b in PARTNER_PAIRS),
            *(Column(p, "neighbouring layers") for p in over),
        ),
        tuple(rows),
    )


def _by_projection(comparisons: Sequence[Comparison]) -> Iterator[tuple[Comparison, int, str]]:
    for comparison in comparisons:
        if NORM in comparison.contrasts:
            projections = comparison.contrasts[NORM].first.examples.projections
            yield from ((comparison, k, p) for k, p in enumerate(projections))


def _compared(c: Comparison) -> tuple[Value, ...]:
    one, two = c.first.role, c.second.role
    if c.kind == "response":
        return one.model, one.data or NOTHING, one.setting, one.response, two.response
    return one.model, one.data or NOTHING, one.response, one.setting, two.setting


def _ratio(contrast: Contrast | None, p: int) -> Number:
    return Number(np.nan) if contrast is None else _each(contrast.ratio_P, 0)[p]


def _name(stem: str, data: str) -> str:
    return f"{stem}_{file_stem(data)}" if data else stem


def _title(title: str, data: str) -> str:
    return f"{title}: {data}" if data else title
