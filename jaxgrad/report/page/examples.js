// The example browser.

const browser = { model: 0, data: 0, cell: null, numbers: "mean", filter: "", sort: NORM, sign: -1, chosen: null, items: [], texts: [] };

const hasExamples = (place) => core.blocks.includes(`examples-${place}`);

// An example's mean over layers of a statistic, of one projection or of their mean.
function exampleNumber(item, statistic, which) {
  const found = item.statistics[statistic];
  const perProjection = (p) => (found == null ? null : Array.isArray(found[p]) ? mean(unpackCurve(found[p]).values) : found[p]);
  const { projections } = core.cells[browser.cell];
  const places = which === "mean" ? projections.map((_, p) => p) : [projections.indexOf(which)];
  const values = places.map(perProjection);
  return values.some((v) => v == null || Number.isNaN(v)) ? null : mean(values);
}

function columns() {
  const statistics = Object.entries(core.statistics).map(([name, about]) => [name, about.short, about.title]);
  const loss = [`The ${core.loss.phrase}`, core.loss.unit].filter(Boolean).join(", in ");
  return [["id", "id", "The record's own id"], ["loss", "loss", loss], ["tokens", "tokens", "Response tokens"], ...statistics];
}

async function chooseCell(place) {
  const cell = core.cells[place];
  Object.assign(browser, { cell: place, model: cell.model, data: cell.data, chosen: null });
  const [items, texts] = await Promise.all([load(`examples-${place}`), load(`texts-${cell.data}`)]);
  if (browser.cell !== place) return;
  Object.assign(browser, { items: items ?? [], texts: texts ?? [] });
  number();
  listExamples();
  showExample(shownItems()[0] ?? null);
  listLeftOut(cell);
}

function number() {
  for (const item of browser.items) {
    item.row = { id: item.id, loss: item.loss, tokens: item.tokens };
    for (const name of Object.keys(core.statistics)) item.row[name] = exampleNumber(item, name, browser.numbers);
  }
}

function shownItems() {
  const wanted = browser.filter.toLowerCase();
  const text = (place) => (place == null ? "" : browser.texts[place]);
  const items = browser.items.filter((item) => !wanted || [item.id, text(item.instruction), text(item.response)].some((part) => part.toLowerCase().includes(wanted)));
  return items.sort((a, b) => compareValues(a.row[browser.sort], b.row[browser.sort], browser.sign));
}

function exampleControls() {
  const { cell: place } = browser;
  const here = (model, data) => core.cells.findIndex((c, i) => c.model === model && c.data === data && hasExamples(i));
  const cells = cellsOf(browser.model, browser.data).filter((cell) => hasExamples(cell.place));
  const changeSet = ({ model = browser.model, data = browser.data }) => {
    const same = core.cells.findIndex((c, i) => c.model === model && c.data === data && c.setting === core.cells[place].setting && c.response === core.cells[place].response && hasExamples(i));
    return chooseCell(same >= 0 ? same : here(model, data)).then(exampleControls);
  };
  const { projections } = core.cells[place];
  const search = element("input", { type: "search", id: "example-filter", placeholder: "words in the text", value: browser.filter, on: { input: () => { browser.filter = search.value; listExamples(); } } });
  replaceControls(byId("example-controls"), [
    ...sharedChoosers("example-", browser, changeSet),
    chooser("example-run", "Setting and response", cells.map((cell) => [cell.place, cellTitle(cell)]), place, (value) => chooseCell(Number(value)).then(exampleControls)),
    chooser("example-numbers", "Numbers of", [["mean", "mean of projections"], ...projections.map((name) => [name, core.projections[name].title])], browser.numbers, (value) => { browser.numbers = value; number(); listExamples(); }),
    element("label", {}, element("span", { class: "label" }, "Filter"), search),
  ]);
}

function listExamples() {
  const head = element("tr", {}, ...columns().map(([name, text, title]) => element("th", { scope: "col", title, class: name === "id" ? null : "n", "aria-sort": browser.sort === name ? (browser.sign > 0 ? "ascending" : "descending") : null },
    element("button", { type: "button", "data-column": name, on: { click: () => {
      Object.assign(browser, { sign: browser.sort === name ? -browser.sign : name === "id" ? 1 : -1, sort: name });
      listExamples();
      document.querySelector(`#example-list [data-column="${name}"]`).focus();
    } } }, text))));
  const items = shownItems();
  const rows = items.map((item) => {
    const row = element("tr", { tabindex: 0, "aria-selected": String(item === browser.chosen), "data-index": item.index },
      ...columns().map(([name]) => element("td", { class: name === "id" ? null : "n" }, name === "id" ? element("bdi", {}, item.id) : name === "tokens" ? shown(item.row[name]) : shown3(item.row[name]))));
    row.addEventListener("click", () => showExample(item));
    row.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") showExample(item);
      else if (event.key === "ArrowDown") row.nextElementSibling?.focus();
      else if (event.key === "ArrowUp") row.previousElementSibling?.focus();
      else return;
      event.preventDefault();
    });
    return row;
  });
  if (!rows.length) rows.push(element("tr", {}, element("td", { colspan: columns().length }, "No example has these words.")));
  byId("example-list").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

async function showExample(item) {
  browser.chosen = item;
  for (const row of document.querySelectorAll("#example-list tbody tr")) row.setAttribute("aria-selected", String(item != null && row.dataset.index === String(item.index)));
  const root = byId("example");
  for (const plot of root.querySelectorAll(".plot")) Plotly.purge(plot);
  if (!item) return root.replaceChildren(element("p", { class: "hint" }, "No example to show."));
  const cell = core.cells[browser.cell];
  const text = (place) => (place == null ? null : browser.texts[place]);
  const fact = (value, what) => element("li", {}, element("b", {}, value), " ", element("span", {}, what));
  const instruction = text(item.instruction), response = text(item.response);
  const body = element("pre", { class: "text", dir: "auto", tabindex: 0 });
  if (instruction == null && response == null) body.append("The file of this run has no texts.");
  else body.append(instruction ?? "", "\n", element("mark", { dir: "auto", title: "the response: its tokens carry the loss" }, response ?? ""));
  const names = cell.projections;
  const drawn = Object.keys(core.statistics).filter((name) => core.statistics[name].drawn && item.statistics[name]);
  const plots = drawn.map((name) => [name, element("div", { class: "plot", role: "img", "aria-label": `${core.statistics[name].title} of this example over layers` })]);
  root.replaceChildren(
    element("h3", {}, "Example ", element("bdi", {}, item.id)),
    element("ul", { class: "facts" },
      fact(shown(item.loss), ["loss", core.loss.unit].filter(Boolean).join(", ")), fact(shown(item.tokens), "response tokens"), fact(`#${item.index}`, "in its file"),
      item.truncated ? fact("cut", "at the longest length") : item.truncated === false ? fact("whole", "not truncated") : null).cloneNode(true),
    body,
    ...plots.flatMap(([name, div]) => [element("h4", {}, core.statistics[name].title), div]),
    element("div", { class: "keys" }, ...names.map((name) => element("span", {}, swatch(core.projections[name]), core.projections[name].title)), element("span", {}, swatch({ colour: "#868e9a", dash: "2px,2px" }, 1.25), "mean of the set")),
  );
  for (const [name, div] of plots) {
    const means = (await load(`curves-${name}`))?.[browser.cell];
    if (browser.chosen !== item) return;
    const series = [];
    names.forEach((projection, p) => {
      const look = core.projections[projection];
      if (means) series.push({ key: `${projection}-mean`, name: look.title, look, layers: cell.layers, faint: true, ...unpackCurve(means.curves[p]) });
    });
    names.forEach((projection, p) => {
      const look = core.projections[projection];
      series.push({ key: projection, name: look.title, look, layers: cell.layers, sizes: 4, ...unpackCurve(item.statistics[name][p]) });
    });
    await drawLines(div, series, { axis: "", bands: false, quiet: true });
  }
}

function listLeftOut(cell) {
  const root = byId("example-left-out");
  root.hidden = !cell.num_left_out;
  root.querySelector("summary").textContent = `${cell.num_left_out} left out of this run`;
  const more = cell.num_left_out - cell.left_out.length;
  root.querySelector("ul").replaceChildren(...cell.left_out.map(([index, id, reason]) => element("li", {}, `#${index}, `, element("bdi", {}, id), ": ", element("bdi", {}, reason))), ...(more > 0 ? [element("li", {}, `and ${more} more`)] : []));
}

async function startExamples() {
  const first = core.cells.findIndex((_, place) => hasExamples(place));
  if (first < 0) return;
  byId("browser").hidden = false;
  byId("example-controls").addEventListener("submit", (event) => event.preventDefault());
  browser.cell = first;
  await chooseCell(first);
  exampleControls();
}
