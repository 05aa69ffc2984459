"""Which tables a report has, in the paper's arrangement: models and settings down, projections across."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from scipy.stats import false_discovery_control

from jaxgrad.analysis import Contrast, Interval
from jaxgrad.analysis.similarity import PARTNERS
from jaxgrad.report.cells import Cell, file_stem
from jaxgrad.report.comparisons import NORM, SUM_LOSS, CellCurves, Comparison, Study
from jaxgrad.report.style import STATISTIC_NAMES
from jaxgrad.report.tables import NOTHING, Column, Number, Table, Value
from jaxgrad.report.verdicts import verdict_of

_ROLE = (Column("model"), Column("data"), Column("response"), Column("setting"))
_COMPARED = tuple(map(Column, ("model", "data", "response", "first", "second")))
_COMPARED_RESPONSES = tuple(map(Column, ("model", "data", "setting", "first", "second")))
_SEGMENTS = ("early", "middle", "last")


def study_tables(study: Study) -> list[Table]:
    """Every table for which the study has something, in the order in which they are read."""
    tables = [_counts(study)]
    for data in study.data_sets():
        curves = [c for c in study.curves if c.cell.role.data == data]
        tables += [_mad(data, curves, study.resampling.level), _segment_mad(data, curves)]
    tables += [_means(study), _settings(study), _length(study, "setting"), _responses(study)]
    tables += [_length(study, "response")]
    tables += [_models(study), _similarity(study)]
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


def _counts(study: Study) -> Table:
    rows = []
    for cell in study.cells:
        examples = cell.examples
        truncated = np.nan if examples.num_truncated is None else examples.num_truncated
        tokens = examples.response_tokens_E[np.isfinite(examples.response_tokens_E)]
        rows.append(
            (
                *_role(cell),
                Number(examples.num_examples, form="count"),
                Number(len(examples.left_out), form="count"),
                "; ".join(f"{n} x {why}" for why, n in examples.reasons().items()) or NOTHING,
                Number(truncated, form="count"),
                Number(float(np.median(tokens)) if len(tokens) else np.nan, form="count"),
                Number(float(examples.loss_E.mean())),
            )
        )
    names = ("used", "left out", "why", "truncated", "median response tokens", "mean loss")
    return Table(
        "examples",
        "Examples used and left out",
        "Truncated examples are used, cut at max_length; their response may have lost its end. "
        "The loss is in nats per response token.",
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
        (*_ROLE, *(Column(p, segment) for segment in _SEGMENTS for p in over)),
        tuple(rows),
    )


def _means(study: Study) -> Table:
    over = _projections(study.curves)
    rows = []
    for c in study.curves:
        of = c.cell.examples.projections
        for name, found in c.descriptions.items():
            numbers = _spread(_each(found.mean_P, len(of)), of, over)
            mads = _spread(_each(found.mad_P, len(of)), of, over)
            rows.append((*_role(c.cell), STATISTIC_NAMES[name].title, *numbers, *mads))
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


def _of_kind(study: Study, kind: str) -> list[Comparison]:
    return [c for c in study.comparisons if c.kind == kind]


def _contrast_numbers(contrast: Contrast, p: int) -> list[Number]:
    """What every table of comparisons has of one projection: ratio, MADs, AUC, pairs, p."""
    return [
        _each(contrast.ratio_P, 0)[p],
        _each(contrast.mad_difference_P, p + 1)[p],
        _each(contrast.chance_smaller_P, 0)[p],
        Number(contrast.sign_flip.num_pairs, form="count"),
        Number(float(contrast.sign_flip.p_P[p]), form="p"),
    ]


_CONTRAST_COLUMNS = ("ratio", "MAD difference", "AUC", "pairs", "p", "p, FDR")


def _with_fdr(rows: list[tuple[Value, ...]]) -> tuple[tuple[Value, ...], ...]:
    """Rows that end in p, with Benjamini & Hochberg's adjusted p behind it."""
    found = [row[-1].value if isinstance(row[-1], Number) else np.nan for row in rows]
    p = np.array(found, np.float64)
    adjusted = np.full_like(p, np.nan)
    known = np.isfinite(p)
    if known.any():
        adjusted[known] = false_discovery_control(p[known], method="bh")
    return tuple((*row, Number(float(q), form="p")) for row, q in zip(rows, adjusted, strict=True))


def _settings(study: Study) -> Table:
    rows: list[tuple[Value, ...]] = [
        (*_compared(c), p, *_contrast_numbers(c.contrasts[NORM], k))
        for c, k, p in _by_projection(_of_kind(study, "setting"))
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


def _length(study: Study, kind: Literal["setting", "response"]) -> Table:
    rows = []
    for c, k, p in _by_projection(_of_kind(study, kind)):
        verdict = verdict_of(c, k)
        ratios = [_ratio(c.contrasts.get(SUM_LOSS), k), _ratio(c.matched, k)]
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
    settings = kind == "setting"
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
            Column("ratio", "mean of the loss"),
            *controls,
        ),
        tuple(rows),
    )


def _responses(study: Study) -> Table:
    rows: list[tuple[Value, ...]] = []
    for c, k, p in _by_projection(_of_kind(study, "response")):
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


def _models(study: Study) -> Table:
    rows: list[tuple[Value, ...]] = []
    for c, k, p in _by_projection(_of_kind(study, "model")):
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


def _similarity(study: Study) -> Table:
    rows = []
    over = _projections(study.curves)
    for cell in study.cells:
        found = cell.similarity
        if found is None:
            continue
        partners = [Number(np.nan)] * len(PARTNERS)
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
            *(Column(f"{a} · {b}", "same layer") for a, b in PARTNERS),
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
