// The section "Curves": what is chosen, its controls, and the panels that follow from it.

let core = null;
const state = { tab: "curves", model: 0, data: 0, statistic: null, kind: null, run: null, layout: "setting", bands: true, shared: true, log: false, off: { projection: new Set(), setting: new Set(), response: new Set() } };

// Colours of settings that share a panel: Tol's muted ones, which no projection has.
const SETTING_COLOURS = ["#332288", "#CC6677", "#44AA99", "#AA8A2E", "#882255", "#117733", "#6699CC", "#888888"];
const SETTING_DASHES = ["solid", "9px,3px", "3px,2px", "9px,3px,2px,3px", "14px,3px", "1px,2px"];
const SETTING_SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"];

const cellsOf = (model, data) => core.cells.map((cell, place) => ({ ...cell, place })).filter((cell) => cell.model === model && cell.data === data);
const settingName = (cell) => core.settings[cell.setting];
const responseName = (cell) => core.responses[cell.response];
const isShown = (cell) => !state.off.setting.has(cell.setting) && !state.off.response.has(cell.response);
const projectionsShown = (names) => names.filter((name) => !state.off.projection.has(name));
const modelName = (place) => core.models[place] || "unnamed model";
const dataName = (place) => core.data[place] || "unnamed data";

function cellTitle(cell) {
  return core.responses.length > 1 && responseName(cell) !== "correct" ? `${settingName(cell)}, ${responseName(cell)}` : settingName(cell);
}

function settingLook(cell) {
  const open = responseName(cell) !== "correct";
  const symbol = SETTING_SYMBOLS[cell.setting % SETTING_SYMBOLS.length];
  return { colour: SETTING_COLOURS[(cell.setting + (open ? core.settings.length : 0)) % SETTING_COLOURS.length], dash: SETTING_DASHES[cell.setting % SETTING_DASHES.length], symbol: open ? `${symbol}-open` : symbol };
}

function set(change) {
  Object.assign(state, change);
  return update();
}

function toggle(what, key, on) {
  if (on) state.off[what].delete(key);
  else state.off[what].add(key);
  return update();
}

function sharedChoosers(prefix, chosen, change) {
  const has = (m, d) => core.cells.some((cell) => cell.model === m && cell.data === d);
  return [
    chooser(`${prefix}model`, "Model", core.models.map((_, m) => [m, modelName(m)]), chosen.model, (value) => {
      const model = Number(value);
      const data = has(model, chosen.data) ? chosen.data : core.data.findIndex((_, d) => has(model, d));
      change({ model, data });
    }),
    chooser(`${prefix}data`, "Data set", core.data.map((_, d) => [d, dataName(d), !has(chosen.model, d)]), chosen.data, (value) => change({ data: Number(value) })),
  ];
}

function buildControls() {
  const cells = cellsOf(state.model, state.data);
  const children = sharedChoosers("", state, set);
  const { tab } = state;
  if (tab === "curves") {
    const names = Object.entries(core.statistics).map(([name, about]) => [name, about.title, !core.blocks.includes(`curves-${name}`)]);
    children.push(chooser("statistic", "Metric", names, state.statistic, (statistic) => set({ statistic })));
  }
  if (tab === "rd") {
    const kinds = { response: "correct → irrelevant", setting: "setting → setting", model: "model → model" };
    const there = Object.entries(kinds).filter(([kind]) => core.blocks.includes(`rd-${kind}`));
    children.push(chooser("kind", "Compared", there, state.kind, (kind) => set({ kind })));
  }
  if (tab === "similarity") {
    const runs = cells.map((cell) => [cell.place, cellTitle(cell), !core.blocks.includes(`similarity-${cell.place}`)]);
    children.push(chooser("run", "Run", runs, state.run, (run) => set({ run: Number(run) })));
  }
  children.push(group("Projections", ...Object.entries(core.projections).map(([name, look]) => chip(`projection-${name}`, look.title, !state.off.projection.has(name), (on) => toggle("projection", name, on), { look }))));
  if (tab !== "similarity") {
    const settings = [...new Set(cells.map((cell) => cell.setting))];
    const responses = [...new Set(cells.map((cell) => cell.response))];
    const overlaid = tab === "curves" && state.layout === "projection";
    if (settings.length > 1) children.push(group("Settings", ...settings.map((s) => chip(`setting-${s}`, core.settings[s], !state.off.setting.has(s), (on) => toggle("setting", s, on), overlaid ? { look: settingLook(cells.find((c) => c.setting === s)) } : {}))));
    if (responses.length > 1) children.push(group("Responses", ...responses.map((r) => chip(`response-${r}`, core.responses[r], !state.off.response.has(r), (on) => toggle("response", r, on)))));
  }
  if (tab === "curves") {
    children.push(group("One panel a", ...["setting", "projection"].map((layout) => chip(`layout-${layout}`, layout, state.layout === layout, () => set({ layout }), { type: "radio", name: "layout", option: true }))));
  }
  if (tab !== "similarity") {
    children.push(group("Axes",
      chip("bands", "bands", state.bands, (bands) => set({ bands }), { option: true, title: "Bootstrap intervals" }),
      chip("shared", "shared y", state.shared, (shared) => set({ shared }), { option: true, title: "The same y axis in every panel" }),
      tab === "curves" ? chip("log", "log y", state.log, (log) => set({ log }), { option: true }) : null));
  }
  replaceControls(byId("controls"), children);
}

function define(title, text, extra = "") {
  byId("definition").replaceChildren(element("b", {}, title), ` ${text} ${extra}`);
}

async function curvePanels() {
  const about = core.statistics[state.statistic];
  define(`${about.title}.`, about.definition);
  const found = (await load(`curves-${state.statistic}`)) ?? {};
  const cells = cellsOf(state.model, state.data).filter(isShown);
  const lines = cells.flatMap((cell) => {
    const entry = found[cell.place];
    if (!entry) return [];
    return projectionsShown(cell.projections).map((name) => ({ cell, name, layers: cell.layers, mad: entry.mad?.[cell.projections.indexOf(name)], ...unpackCurve(entry.curves[cell.projections.indexOf(name)]) }));
  });
  const options = { axis: about.axis, log: state.log, bands: state.bands, range: state.shared ? rangeOf(lines, state) : null };
  if (state.layout === "setting") {
    return cells.map((cell) => {
      const entry = found[cell.place];
      const series = lines.filter((line) => line.cell === cell).map((line) => ({ ...line, key: line.name, name: core.projections[line.name].title, look: core.projections[line.name] }));
      const below = series.some((s) => s.mad) ? [numbersLine("MAD", "Mean absolute difference between neighbouring layers, with its interval", series.map((s) => [s.name, s.look, s.mad]))] : [];
      if (!entry) below.push(element("p", { class: "missing" }, cell.missing[state.statistic] ?? "Not in this page."));
      return { key: `cell ${cell.place}`, title: cellTitle(cell), sub: `${entry?.used ?? cell.used} examples`, below, draw: entry ? (div) => drawLines(div, series, { ...options, segments: cell.segments }) : null };
    });
  }
  return projectionsShown(Object.keys(core.projections)).map((name) => {
    const series = lines.filter((line) => line.name === name).map((line) => ({ ...line, key: `cell-${line.cell.place}`, name: cellTitle(line.cell), look: settingLook(line.cell) }));
    return { key: `projection ${name}`, title: core.projections[name].title, sub: "all settings shown", below: [keys(series)], draw: (div) => drawLines(div, series, { ...options, segments: series[0]?.cell.segments }) };
  });
}

function keys(series) {
  return element("div", { class: "keys" }, ...series.map((s) => element("span", {}, swatch(s.look), element("bdi", {}, s.name))));
}

async function rdPanels() {
  define("RD of the nuclear norm.", "(second − first) / first at each layer; zero: no difference. Large markers: the five layers with the largest |RD|.");
  const found = (state.kind && (await load(`rd-${state.kind}`))) ?? [];
  const panels = found.filter((item) => {
    const [one, two] = [core.cells[item.first], core.cells[item.second]];
    return one.data === state.data && [one.model, two.model].includes(state.model) && isShown(one) && isShown(two);
  }).map((item) => {
    const cell = core.cells[item.first];
    const series = projectionsShown(cell.projections).map((name) => {
      const p = cell.projections.indexOf(name);
      return { key: name, name: core.projections[name].title, look: core.projections[name], layers: cell.layers, sizes: cell.layers.map((layer) => (item.largest[p].includes(layer) ? 9 : 4)), mean: item.mean?.[p], ...unpackCurve(item.curves[p]) };
    });
    return { item, cell, series };
  });
  const range = state.shared ? rangeOf(panels.flatMap((p) => p.series), { bands: state.bands }) : null;
  return panels.map(({ item, cell, series }) => ({
    key: `rd ${item.first} ${item.second}`, title: item.title, sub: "",
    below: series.some((s) => s.mean) ? [numbersLine("|RD|", "Absolute RD, averaged over layers, with its interval", series.map((s) => [s.name, s.look, s.mean]))] : [],
    draw: (div) => drawLines(div, series, { axis: "RD", range, bands: state.bands, zero: true, segments: cell.segments }),
  }));
}

async function similarityPanels() {
  const cells = cellsOf(state.model, state.data).filter((cell) => core.blocks.includes(`similarity-${cell.place}`));
  if (!cells.some((cell) => cell.place === state.run)) state.run = cells[0]?.place ?? null;
  buildControls();
  define("Similarity of layers.", "Cosine between the flattened gradients of two layers, averaged over examples; 1 where they point the same way. The diagonal is 1 by definition; colours span 99 % of the others.");
  if (state.run == null) return [];
  const found = await load(`similarity-${state.run}`);
  const n = found.layers.length;
  const all = projectionsShown(found.projections).map((name) => {
    const upper = found.upper[found.projections.indexOf(name)];
    const rows = Array.from({ length: n }, (_, i) => Array.from({ length: n }, (_, j) => (i === j ? 1 : null)));
    let at = 0;
    for (let i = 0; i < n; i++) for (let j = i + 1; j < n; j++) {
      const v = upper[at++];
      rows[i][j] = rows[j][i] = v == null ? null : v / 1000;
    }
    return { name, rows };
  }).filter(({ rows }) => rows.some((row, i) => row.some((v, j) => i !== j && v != null)));
  const off = all.flatMap(({ rows }) => rows.flatMap((row, i) => finite(row.filter((_, j) => j !== i)))).map(Math.abs);
  // Nearly all of them: a single pair of layers must not pale the rest.
  const most = Math.max(0.05, off.sort((a, b) => a - b)[Math.floor(off.length * 0.99)] ?? 0);
  return all.map(({ name, rows }) => ({ key: `similarity ${name}`, title: core.projections[name]?.title ?? name, sub: `${found.used} examples`, draw: (div) => drawMatrix(div, found.layers, rows, most) }));
}

const EMPTY = {
  curves: "Nothing is left to draw: switch a projection, a setting or a response on.",
  rd: "No two runs of this model and data set are compared so, or all are switched off.",
  similarity: "Similarities were not measured for this model and data set, or did not fit into the page. `analyze --similarity` measures them.",
};

let turn = 0;
async function update() {
  const mine = ++turn;
  buildControls();
  const panels = await { curves: curvePanels, rd: rdPanels, similarity: similarityPanels }[state.tab]();
  if (mine !== turn) return;
  const root = byId("panels");
  root.classList.toggle("squares", state.tab === "similarity");
  root.setAttribute("aria-labelledby", `tab-${state.tab}`);
  await showPanels(root, panels);
  if (!panels.length) root.append(element("p", { class: "empty" }, EMPTY[state.tab]));
}

function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const choose = (tab) => {
    for (const other of tabs) {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
    }
    return set({ tab: tab.id.slice(4) });
  };
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      next.focus();
      choose(next);
    });
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
}

function startCurves() {
  state.statistic = Object.keys(core.statistics).find((name) => core.blocks.includes(`curves-${name}`)) ?? Object.keys(core.statistics)[0];
  state.kind = ["response", "setting", "model"].find((kind) => core.blocks.includes(`rd-${kind}`)) ?? null;
  Object.assign(state, { model: core.cells[0].model, data: core.cells[0].data });
  byId("charts").hidden = false;
  byId("no-curves").hidden = true;
  startTabs();
  return update();
}
