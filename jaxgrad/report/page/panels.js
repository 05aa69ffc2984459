// One panel: a figure with a heading, a plot, and numbers below it.

const CONFIG = {
  responsive: true, displaylogo: false,
  // These four alone: others would send the plot to a server (which the page's policy forbids).
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  toImageButtonOptions: { format: "svg", filename: "jaxgrad" },
};

function axisStyle(look) {
  return { gridcolor: look.grid, linecolor: look.rule, zeroline: false, tickfont: { size: 11, color: look.soft }, title: { font: { size: 12, color: look.soft } }, automargin: true, ticks: "" };
}

function layoutOf(look, extra) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: look.sans, size: 12, color: look.ink },
    margin: { l: 50, r: 10, t: 12, b: 38 }, showlegend: false, dragmode: "zoom", hoverdistance: 40,
    hoverlabel: { bgcolor: look.raised, bordercolor: look.rule, font: { family: look.sans, size: 12, color: look.ink } },
    modebar: { bgcolor: look.raised, color: look.faint, activecolor: look.ink },
    ...extra,
  };
}

// The outline of a band: one closed piece for each stretch of layers that have limits.
function band(layers, low, high, floor) {
  const x = [], y = [];
  for (let i = 0; i < layers.length; i++) {
    if (low[i] == null || high[i] == null) continue;
    let end = i;
    while (end + 1 < layers.length && low[end + 1] != null && high[end + 1] != null) end++;
    if (x.length) { x.push(null); y.push(null); }
    for (let k = i; k <= end; k++) { x.push(layers[k]); y.push(Math.max(high[k], floor)); }
    for (let k = end; k >= i; k--) { x.push(layers[k]); y.push(Math.max(low[k], floor)); }
    i = end;
  }
  return { x, y };
}

const finite = (values) => values.filter((value) => value != null);

// The y range of some series, with some room; null where there are no values.
function rangeOf(series, { log, bands }) {
  let all = series.flatMap((s) => finite(bands ? [...s.values, ...s.low, ...s.high] : s.values));
  if (log) all = all.filter((value) => value > 0).map(Math.log10);
  if (!all.length) return null;
  let low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
  const air = (high - low || Math.abs(high) || 1) * 0.06;
  // Air below zero would suggest that the statistic can be negative.
  return [!log && low >= 0 ? Math.max(low - air, 0) : low - air, high + air];
}

// Curves over layers. A series: key, name, look (colour, dash, symbol), layers, values, low, high.
function drawLines(div, series, { axis, range, log = false, bands = true, segments = null, zero = false, quiet = false }) {
  const look = theme();
  const floor = log ? 10 ** ((range ?? rangeOf(series, { log, bands: false }))?.[0] ?? 0) / 10 : -Infinity;
  const traces = [];
  if (bands) {
    for (const s of series) {
      const outline = band(s.layers, s.low, s.high, floor);
      if (outline.x.length) traces.push({ ...outline, uid: `${s.key}-band`, type: "scatter", mode: "lines", fill: "toself", fillcolor: faded(onPage(s.look.colour, look.dark), 0.16), line: { width: 0 }, hoverinfo: "skip" });
    }
  }
  for (const s of series) {
    const colour = onPage(s.look.colour, look.dark);
    traces.push({
      uid: s.key, name: plain(s.name), type: "scatter", x: s.layers, y: s.values, connectgaps: false,
      mode: s.faint ? "lines" : "lines+markers",
      line: { color: s.faint ? faded(colour, 0.55) : colour, width: s.faint ? 1.25 : 1.9, dash: s.faint ? "2px,2px" : s.look.dash },
      marker: { symbol: s.look.symbol, size: s.sizes ?? 5.5, opacity: 1, color: colour, line: { width: s.look.symbol?.endsWith("-open") ? 1.4 : 0, color: colour } },
      customdata: s.values.map((v, i) => `${shown(v)} ${limits(s.low?.[i], s.high?.[i])}`.trim()),
      hovertemplate: `<b>${plain(s.name)}</b>  %{customdata}<extra></extra>`,
      ...(s.faint ? { hoverinfo: "skip", hovertemplate: null } : {}),
    });
  }
  const shapes = [], annotations = [];
  if (zero) shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, line: { color: look.faint, width: 1 }, layer: "below" });
  for (const [i, [first, last]] of (segments ?? []).entries()) {
    if (i) shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: first - 0.5, x1: first - 0.5, line: { color: look.rule, width: 1, dash: "1px,3px" }, layer: "below" });
    annotations.push({ text: core.segments[i], x: (first + last) / 2, xref: "x", y: 1, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 10, color: look.faint } });
  }
  const layers = series[0]?.layers ?? [0, 1];
  const style = axisStyle(look);
  return Plotly.react(div, traces, layoutOf(look, {
    hovermode: "x unified", shapes, annotations,
    xaxis: { ...style, showgrid: false, range: [layers[0] - 0.6, layers.at(-1) + 0.6], title: { ...style.title, text: quiet ? "" : "layer", standoff: 4 }, unifiedhovertitle: { text: "layer %{x}" }, tickformat: "d", nticks: 9, showline: true },
    yaxis: { ...style, type: log ? "log" : "linear", range: range ?? rangeOf(series, { log, bands }) ?? [0, 1], title: { ...style.title, text: axis, standoff: 6 }, nticks: 6, exponentformat: "power", minor: { showgrid: false }, ...(log ? { dtick: undefined } : {}) },
    margin: quiet ? { l: 44, r: 6, t: 6, b: 24 } : { l: 50, r: 10, t: 22, b: 38 },
  }), CONFIG);
}

// A matrix of cosines, blue above zero and orange below, white at zero.
function drawMatrix(div, layers, rows, most) {
  const look = theme();
  const text = rows.map((row) => row.map((v) => (v == null ? "undefined" : shown(v))));
  const zero = look.dark ? "#23282f" : "#f7f6f2";
  const scale = look.dark
    ? [[0, "#f0a35c"], [0.25, "#8f5a2a"], [0.5, zero], [0.75, "#27648f"], [1, "#86c8f5"]]
    : [[0, "#8c4a05"], [0.25, "#e0a35f"], [0.5, zero], [0.75, "#5fa5d2"], [1, "#084c7d"]];
  const style = axisStyle(look);
  const trace = { type: "heatmap", x: layers, y: layers, z: rows, text, colorscale: scale, zmin: -most, zmax: most, hoverongaps: false, hovertemplate: "layers %{y} and %{x}: <b>%{text}</b><extra></extra>", colorbar: { thickness: 9, outlinewidth: 0, len: 1, tickfont: { size: 11, color: look.soft }, nticks: 5 } };
  return Plotly.react(div, [trace], layoutOf(look, {
    margin: { l: 40, r: 4, t: 14, b: 38 },
    xaxis: { ...style, showgrid: false, title: { ...style.title, text: "layer", standoff: 4 }, constrain: "domain" },
    yaxis: { ...style, showgrid: false, autorange: "reversed", scaleanchor: "x", constrain: "domain" },
  }), CONFIG);
}

// Shows panels. One whose key was there before is kept, so that Plotly updates its plot.
function showPanels(root, wanted) {
  const old = new Map([...root.children].filter((c) => c.dataset.key).map((c) => [c.dataset.key, c]));
  const nodes = wanted.map((panel) => {
    const node = old.get(panel.key) ?? element("figure", { class: "panel", "data-key": panel.key }, element("figcaption"), element("div", { class: "plot" }), element("div", { class: "below" }));
    old.delete(panel.key);
    node.children[0].replaceChildren(element("h3", {}, element("bdi", {}, panel.title)), element("span", { class: "sub" }, element("bdi", {}, panel.sub ?? "")));
    node.children[2].replaceChildren(...(panel.below ?? []));
    node.children[1].hidden = !panel.draw;
    return node;
  });
  for (const gone of old.values()) Plotly.purge(gone.children[1]);
  root.replaceChildren(...nodes);
  return Promise.all(wanted.map((panel, i) => {
    const plot = nodes[i].children[1];
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `${panel.title}, ${panel.sub ?? ""}`);
    return panel.draw?.(plot);
  }));
}

// A line of numbers below a plot: what they are, then one a series.
function numbersLine(what, title, entries) {
  const list = element("div", { class: "numbers", title }, element("span", { class: "what" }, what));
  list.style.gridTemplateColumns = `repeat(${entries.length}, minmax(0, 1fr))`;
  for (const [name, look, [value, low, high]] of entries) {
    const label = element("span", {}, name + " ", element("b", {}, shown3(value)), element("i", {}, low == null ? "" : `[${shown3(low)}, ${shown3(high)}]`));
    label.style.borderLeft = `3px solid ${onPage(look.colour)}`;
    label.style.paddingLeft = ".35rem";
    list.append(label);
  }
  return list;
}

// Three significant digits, zeros at the end kept, as the tables have them.
function shown3(value) {
  const size = Math.abs(value);
  if (value == null || Number.isNaN(value)) return "–";
  if (size >= 1e-3 && size < 999.5) return value.toPrecision(3).replace("-", "−");
  return shown(Number(value.toPrecision(3)));
}
