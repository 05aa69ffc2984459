// Elements, numbers and data blocks. Text enters the page as text alone, never as markup.

// The statistic that the page opens with; comparisons.py has the same name for it.
const NORM = "nuclear_norm";

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// Up to four significant digits, as people write them.
function shown(value) {
  if (value == null || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) return value.toExponential(3).replace("e", "e").replace("-", "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

function limits(low, high) {
  return low == null || high == null ? "" : `[${shown(low)}, ${shown(high)}]`;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// Data blocks: base64 of gzip of JSON (or of plotly.js itself).
async function unpackText(name) {
  const coded = atob(byId(`data-${name}`).textContent);
  const bytes = new Uint8Array(coded.length);
  for (let i = 0; i < coded.length; i++) bytes[i] = coded.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const loaded = new Map();
function load(name) {
  if (!byId(`data-${name}`)) return Promise.resolve(null);
  if (!loaded.has(name)) loaded.set(name, unpackText(name).then(JSON.parse));
  return loaded.get(name);
}

// A packed curve: [exponent, integers, distances down, distances up] -> values and limits.
function unpackCurve([exponent, values, down, up]) {
  const scale = (v) => (v == null ? null : exponent < 0 ? v / 10 ** -exponent : v * 10 ** exponent);
  const moved = (by, sign) =>
    values.map((v, i) => (v == null || !by || by[i] == null ? null : scale(v + sign * by[i])));
  return { values: values.map(scale), low: moved(down, -1), high: moved(up, 1) };
}

// Plotly understands some markup in texts. Names from data must not be taken for it.
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "%\u200b{");

function theme() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(`--${name}`).trim();
  return { ink: get("ink"), soft: get("soft"), faint: get("faint"), grid: get("grid"), rule: get("rule"), raised: get("raised"), sans: get("sans"), dark: matchMedia("screen and (prefers-color-scheme: dark)").matches };
}

// A colour on a dark page: the same hue, mixed with white.
function onPage(colour, dark = theme().dark) {
  if (!dark) return colour;
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return "#" + parts.map((c) => Math.round(c + (255 - c) * 0.28).toString(16).padStart(2, "0")).join("");
}

function faded(colour, alpha) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

const MARKERS = {
  circle: "M12 6a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z", square: "M12 3h6v6h-6z",
  "triangle-up": "M15 2l4 7.5h-8z", diamond: "M15 1.6l4 4.4-4 4.4-4-4.4z", "triangle-down": "M15 10l4-7.5h-8z",
  cross: "M13.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z", x: "M12 3l1.2-1.2 1.8 1.9 1.8-1.9 1.2 1.2-1.9 3 1.9 3-1.2 1.2-1.8-1.9-1.8 1.9-1.2-1.2 1.9-3z",
};

// A piece of line with its marker, for chips and legends.
function swatch(look, width = 2) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 30 12");
  svg.setAttribute("aria-hidden", "true");
  const part = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    svg.append(node);
  };
  const colour = onPage(look.colour);
  part("path", { d: "M0 6h30", stroke: colour, "stroke-width": width, fill: "none", "stroke-dasharray": look.dash === "solid" ? "none" : look.dash.replaceAll("px", "") });
  if (look.symbol) part("path", { d: MARKERS[look.symbol.replace("-open", "")] ?? MARKERS.circle, fill: look.symbol.endsWith("-open") ? "var(--raised)" : colour, stroke: colour });
  return svg;
}

// Controls. Each has an id, so that the focus stays where it was when they are rebuilt.
function chooser(id, label, options, value, change) {
  const select = element("select", { id, on: { change: () => change(select.value) } },
    ...options.map(([key, text, disabled]) => element("option", { value: key, disabled, selected: String(key) === String(value) }, text)));
  return element("label", {}, element("span", { class: "label" }, label), select);
}

function chip(id, text, checked, change, { look, type = "checkbox", name, option = false, title } = {}) {
  const input = element("input", { id, type, name, checked, on: { change: () => change(input.checked) } });
  return element("label", { class: option ? "chip option" : "chip", title }, input, look ? swatch(look) : null, element("span", { class: "text" }, element("bdi", {}, text)));
}

function group(label, ...chips) {
  return element("fieldset", {}, element("legend", {}, label), element("div", { class: "row" }, ...chips));
}

function replaceControls(form, children) {
  const focused = form.contains(document.activeElement) ? document.activeElement.id : null;
  form.replaceChildren(...children.filter((child) => child));
  if (focused) byId(focused)?.focus();
}
