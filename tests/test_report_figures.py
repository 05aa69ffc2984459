import dataclasses
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from analysis_runs import set_of

from jaxgrad.analysis import Interval, Resampling, describe
from jaxgrad.analysis.similarity import Similarity
from jaxgrad.errors import UserError
from jaxgrad.projections import PROJECTION_NAMES
from jaxgrad.report.canvas import drawing, shortened
from jaxgrad.report.cells import Cell, Role
from jaxgrad.report.comparisons import compare_all
from jaxgrad.report.figures import cosine_bound, plan_figures, write_figures
from jaxgrad.report.panels import folded
from jaxgrad.report.style import PROJECTION_STYLE

E, L = 11, 5
FEW = Resampling(num_resamples=100, num_permutations=100)


def interval(estimate):
    return Interval(estimate, estimate - 0.1, estimate + 0.1, estimate * 0, 0.95, "percentile", 100)


def similarity(seed=0, maps=True, curves=True, projections=4):
    rng = np.random.default_rng(seed)
    cosine_PLL = rng.uniform(-0.15, 0.15, (projections, L, L))
    cosine_PLL[:, range(L), range(L)] = 1
    return Similarity(
        tuple(range(L)),
        ("q", "k", "v", "o")[:projections],
        cosine_PLL if maps else None,
        interval(rng.uniform(-0.1, 0.1, (L - 1, projections))) if curves else None,
        interval(rng.uniform(-0.1, 0.1, (L, 2))) if curves else None,
        E,
        0,
    )


def cell(role, seed, examples=E, similar=None, projections=4, scale=1.0):
    rng = np.random.default_rng(seed)
    value_ELP = scale * rng.lognormal(0, 0.3, (examples, L, projections))
    tokens = rng.integers(5, 40, examples).tolist()
    return Cell(role, Path("x"), set_of(value_ELP, role.title, tokens=tokens), similar)


def study_of(cells, **options):
    return compare_all(cells, title="t", resampling=FEW, **options)


@pytest.fixture(scope="module")
def study():
    roles = [
        Role("m", data, setting, response)
        for data in ("AQuA", "GSM8K")
        for setting in ("none", "detailed")
        for response in ("correct", "irrelevant")
    ]
    return study_of(
        [cell(role, k, similar=similarity(k) if k == 0 else None) for k, role in enumerate(roles)]
    )


@pytest.fixture(scope="module")
def written(study, tmp_path_factory):
    return write_figures(study, tmp_path_factory.mktemp("figures") / "new")


def texts(path):
    return [
        element.text for element in ElementTree.parse(path).iter() if element.tag.endswith("}text")
    ]


def drawn(study, kind, **options):
    plan = next(plan for plan in plan_figures(study, **options) if plan.parts[0] == kind)
    with drawing():
        return plan.draw()


def lines(ax):
    """Projection's title -> the line of that name."""
    return {line.get_label(): line for line in ax.get_lines()}


def test_every_projection_of_a_layer_has_a_style():
    assert set(PROJECTION_STYLE) == set(PROJECTION_NAMES) - {"lm_head"}
    for what in ("colour", "dash", "marker", "symbol", "title"):
        values = [getattr(style, what) for style in PROJECTION_STYLE.values()]
        if what != "dash":
            assert len(set(values)) == len(values)
    assert PROJECTION_STYLE["q"].plotly_dash() == "solid"
    assert PROJECTION_STYLE["k"].plotly_dash(2) == "10px,3.2px"


def test_files_are_there_and_hold_their_titles(written):
    assert [file.name for file in written] == [
        "curves.m.aqua.nuclear_norm",
        "rd.response.m.aqua",
        "curves.m.gsm8k.nuclear_norm",
        "rd.response.m.gsm8k",
        "mad.m",
        "length.m",
        "similarity.m.aqua.none.correct",
    ]
    for file in written:
        assert file.svg.name == f"{file.name}.svg"
        assert shortened(file.title) in texts(file.svg)
        assert file.png.read_bytes().startswith(b"\x89PNG")
        assert "95% bootstrap intervals (100 resamples" in file.caption
        assert "only 11 examples" in file.caption.lower() or file.name.startswith("similarity")
    assert "none, irrelevant" in texts(written[0].svg)


def test_the_same_study_gives_the_same_bytes(study, written, tmp_path):
    # A user's own settings change nothing, and are what they were afterwards.
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False, "savefig.dpi": 30}):
        again = write_figures(study, tmp_path)
        assert matplotlib.rcParams["font.size"] == 20
    for one, two in zip(written, again, strict=True):
        assert one.svg.read_bytes() == two.svg.read_bytes()
        assert one.png.read_bytes() == two.png.read_bytes()


def test_curves_and_bands_are_those_of_the_descriptions(study):
    figure = drawn(study, "curves")
    # Panels by row: a row a response, a column a setting; the study has them setting by setting.
    for ax, place in zip(figure.axes, (0, 2, 1, 3), strict=True):
        curves = study.curves[place]
        assert ax.get_title("left") == curves.cell.role.within
        curve_LP = curves.descriptions["nuclear_norm"].curve_LP
        for p, name in enumerate(curves.cell.examples.projections):
            line = lines(ax)[PROJECTION_STYLE[name].title]
            np.testing.assert_array_equal(line.get_xdata(), range(L))
            np.testing.assert_array_equal(line.get_ydata(), curve_LP.estimate[:, p])
            assert line.get_color() == PROJECTION_STYLE[name].colour
            y = ax.collections[p].get_paths()[0].vertices[:, 1]
            assert (y.min(), y.max()) == (curve_LP.low[:, p].min(), curve_LP.high[:, p].max())


def test_y_limits(study):
    def limits(y_limits):
        return [ax.get_ylim() for ax in drawn(study, "curves", y_limits=y_limits).axes]

    highest = [c.descriptions["nuclear_norm"].curve_LP.high.max() for c in study.curves[:4]]
    assert len(set(limits("shared"))) == 1
    assert limits("shared")[0][1] > max(highest)
    free = limits("free")
    assert len(set(free)) == 4
    assert all(
        top > high for (_, top), high in zip(free, np.array(highest)[[0, 2, 1, 3]], strict=True)
    )
    assert set(limits((0.5, 2.5))) == {(0.5, 2.5)}


@pytest.mark.parametrize("bad", ["wide", (2.0, 1.0), (0.0, float("nan"))])
def test_y_limits_that_are_none(study, bad, tmp_path):
    with pytest.raises(UserError, match="y limits"):
        write_figures(study, tmp_path, y_limits=bad)


def test_relative_differences_are_those_of_the_contrasts(study):
    figure = drawn(study, "rd")
    of_aqua = [c for c in study.comparisons if c.kind == "response" and c.first.role.data == "AQuA"]
    assert len(figure.axes) == len(of_aqua) == 2
    for ax, one in zip(figure.axes, of_aqua, strict=True):
        rd_LP = one.contrasts["nuclear_norm"].rd_LP.estimate
        np.testing.assert_array_equal(lines(ax)["V"].get_ydata(), rd_LP[:, 2])


def test_mad_points_and_whiskers(study):
    ax = drawn(study, "mad").axes[0]
    mads = [study.curves[place].descriptions["nuclear_norm"].mad_P for place in (0, 2)]
    points = [line for line in ax.get_lines() if line.get_label() == "K"]
    assert [float(line.get_ydata()[0]) for line in points] == [mad.estimate[1] for mad in mads]
    floor = ax.get_ylim()[0]
    ends = [tuple(line.get_ydata()) for line in ax.get_lines() if len(line.get_ydata()) == 2]
    assert (max(mads[0].low[1], floor), mads[0].high[1]) in ends


def test_length_controls(study):
    ax = drawn(study, "length").axes[0]
    one = next(c for c in study.comparisons if c.kind == "setting")
    first, second = (c.examples.column_ELP["nuclear_norm"][..., 3] for c in (one.first, one.second))
    expected = [second.mean() / first.mean()]
    tokens = [c.examples.response_tokens[:, None] for c in (one.first, one.second)]
    expected.append((second * tokens[1]).mean() / (first * tokens[0]).mean())
    expected.append(one.matched.ratio_P.estimate[3])
    expected.append(np.exp(one.regression.adjusted_P.estimate[3]))
    points = [float(line.get_xdata()[0]) for line in ax.get_lines() if line.get_label() == "O"]
    np.testing.assert_allclose(points, expected, rtol=1e-12)


def test_without_lengths_in_common_the_regression_is_hollow_and_nothing_is_matched():
    rng = np.random.default_rng(3)
    cells = []
    for setting, low in (("none", 5), ("detailed", 100)):
        tokens = rng.integers(low, 2 * low, E).tolist()
        examples = set_of(rng.lognormal(0, 0.3, (E, L, 4)), setting, tokens=tokens)
        cells.append(Cell(Role("m", "", setting), Path("x"), examples, None))
    ax = drawn(study_of(cells), "length").axes[0]
    points = [line for line in ax.get_lines() if line.get_label() == "O"]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False, False, True]
    assert "not available" in [text.get_text() for text in ax.texts]


HOSTILE = "$x_1$ </text><script>alert(1)</script> \x00\x1b\ufffe\u202e & \"'\n" + "long " * 50


def test_names_are_text_alone_and_no_two_files_have_one_name(tmp_path):
    roles = [
        Role(HOSTILE, "a b", "$y^2$"),
        Role(HOSTILE, "a-b", "$y^2$"),
        Role("通义", "?", "$\\frac"),
    ]
    files = write_figures(
        study_of([cell(role, 0, similar=similarity()) for role in roles]), tmp_path
    )
    assert len({file.svg for file in files}) == len(files) == len(list(tmp_path.glob("*.png")))
    assert {"curves.unnamed.unnamed.nuclear_norm"} < {file.name for file in files}
    assert any(file.name.endswith("a-b.nuclear_norm-2") for file in files)
    for file in files:
        assert not any(
            element.tag.endswith("script") for element in ElementTree.parse(file.svg).iter()
        )
    assert "$y^2$" in texts(files[0].svg)
    assert any(text.startswith("Nuclear norm: $x_1$") for text in texts(files[0].svg))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", "short"),
        ("a\n\tb\x00c", "a b c"),
        ("abcdefghij", "abcde…ij"[:3] + "…ij"),
        ("", ""),
    ],
)
def test_shortened(text, expected):
    assert shortened(text, 6) == expected


def test_a_single_set(tmp_path):
    files = write_figures(study_of([cell(Role("m", "", "none"), 0)]), tmp_path)
    assert [file.name for file in files] == ["curves.m.nuclear_norm", "mad.m"]


def test_one_example_has_no_band_and_the_caption_says_why(tmp_path):
    alone = study_of([cell(Role("m", "", "none"), 0, examples=1)])
    files = write_figures(alone, tmp_path)
    assert "No bands" in files[0].caption and "fewer than 2 examples" in files[0].caption
    curve_LP = describe(alone.cells[0].examples.values(), FEW).curve_LP
    assert np.isnan(curve_LP.low).all()
    ax = drawn(alone, "curves").axes[0]
    np.testing.assert_array_equal(lines(ax)["Q"].get_ydata(), curve_LP.estimate[:, 0])


def test_a_subset_of_projections_and_layers():
    one = cell(Role("m", "", "none"), 0, projections=2)
    examples = dataclasses.replace(
        one.examples, layers=(0, 3, 4, 9, 11), projections=("gate", "up")
    )
    study = study_of([dataclasses.replace(one, examples=examples)])
    ax = drawn(study, "curves").axes[0]
    np.testing.assert_array_equal(lines(ax)["up"].get_xdata(), [0, 3, 4, 9, 11])
    # Steps between layers that are no neighbours are no MAD.
    assert [plan.parts[0] for plan in plan_figures(study)] == ["curves"]


def test_a_run_that_is_missing_in_the_grid_is_named():
    roles = [Role("m", "", "none"), Role("m", "", "detailed"), Role("m", "", "none", "irrelevant")]
    figure = drawn(study_of([cell(role, k) for k, role in enumerate(roles)]), "curves")
    said = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert said == [["n = 11"], ["n = 11"], ["n = 11"], ["no run"]]


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("curves", [True, False])
def test_similarities_that_are_there_in_part(maps, curves):
    similar = similarity(maps=maps, curves=curves)
    study = study_of([cell(Role("m", "", "none"), 0, similar=similar)])
    plans = [plan for plan in plan_figures(study) if plan.parts[0] == "similarity"]
    assert len(plans) == (maps or curves)
    if not plans:
        return
    with drawing():
        figure = plans[0].draw()
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert len(images) == 4 * maps
    for image, cosine_LL in zip(images, similar.layer_cosine_PLL if maps else (), strict=True):
        np.testing.assert_array_equal(image.get_array(), cosine_LL)
        # 0.15 is beyond 0.1 and within 0.2; the diagonals do not count.
        assert image.get_clim() == (-0.2, 0.2)
    if curves:
        partner_L2 = similar.partner_L2.estimate
        np.testing.assert_array_equal(
            lines(figure.axes[-1])["Q with O"].get_ydata(), partner_L2[:, 0]
        )
        np.testing.assert_array_equal(
            lines(figure.axes[-1])["K with V"].get_ydata(), partner_L2[:, 1]
        )


def test_colours_of_cosines_without_any():
    assert cosine_bound([cell(Role("m", "", "none"), 0)]) == 1.0


def test_long_rows_are_folded():
    assert folded([list("abcde"), list("ABCDE")]) == [
        ["a", "b", "c"], ["A", "B", "C"], ["d", "e", None], ["D", "E", None],
    ]  # fmt: skip
    assert folded([list("abcd")]) == [list("abcd")]
