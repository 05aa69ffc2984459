// Sorting of the HTML tables.

const textOrder = new Intl.Collator(undefined, { numeric: true });

function sortValue(row, column) {
  const cell = row.cells[column];
  return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
}

// Numbers by size, texts by the alphabet; undefined values come last in both directions.
function compareValues(a, b, sign) {
  const undefinedA = a == null || Number.isNaN(a), undefinedB = b == null || Number.isNaN(b);
  if (undefinedA || undefinedB) return undefinedA - undefinedB;
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * textOrder.compare(String(a), String(b));
}

function sortTable(table, column) {
  const heads = [...table.tHead.rows].at(-1).cells;
  const sign = heads[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const rows = [...table.tBodies[0].rows].map((row) => [sortValue(row, column), row]);
  rows.sort(([a], [b]) => compareValues(a, b, sign));
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  table.tBodies[0].replaceChildren(...rows.map(([, row]) => row));
}

function startTables() {
  for (const table of document.querySelectorAll("details.table table")) {
    for (const [column, head] of [...[...table.tHead.rows].at(-1).cells].entries()) {
      const button = element("button", { type: "button", on: { click: () => sortTable(table, column) } });
      button.append(...head.childNodes);
      head.append(button);
    }
  }
}
