// Start: the tables work at once; curves and examples wait for the data and plotly.js to be unpacked.

function sayWhy(text) {
  byId("no-curves").hidden = false;
  byId("no-curves").textContent = text;
}

function startNavigation() {
  const links = new Map([...document.querySelectorAll(".side a")].map((a) => [a.hash.slice(1), a]));
  const places = [...links.keys()].map(byId);
  const mark = () => {
    const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 4;
    const current = atEnd ? places.at(-1) : places.filter((place) => place.getBoundingClientRect().top < innerHeight * 0.35).at(-1) ?? places[0];
    for (const [id, link] of links) {
      if (id === current.id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; mark(); });
  }, { passive: true });
  mark();
}

async function start() {
  startTables();
  startNavigation();
  addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
  if (typeof DecompressionStream === "undefined") {
    sayWhy("The curves and the examples need a browser with DecompressionStream (Chrome 80, Firefox 113, Safari 16.4 or later). The findings and the tables are complete without it.");
    return;
  }
  const [library, found] = await Promise.all([unpackText("plotly"), load("core"), load(`curves-${NORM}`)]);
  core = found;
  performance.mark("jaxgrad-unpacked");
  // The policy knows this script by its digest.
  document.head.append(Object.assign(document.createElement("script"), { textContent: library }));
  if (typeof Plotly === "undefined") throw new Error("plotly.js did not run");
  performance.mark("jaxgrad-plotly");
  if (!core.cells.length || !Object.keys(core.statistics).length) return sayWhy("This report has no run with curves.");
  await startCurves();
  performance.mark("jaxgrad-first-plot");
  document.documentElement.dataset.firstPlot = performance.now().toFixed(0);
  await startExamples();
  document.documentElement.dataset.ready = performance.now().toFixed(0);
  const redraw = () => { update(); if (browser.chosen) showExample(browser.chosen); };
  matchMedia("screen and (prefers-color-scheme: dark)").addEventListener("change", redraw);
}

start().catch((error) => {
  sayWhy(`The curves could not be drawn: ${error.message}. The findings and the tables are complete without them.`);
  document.documentElement.dataset.failed = error.message;
});
