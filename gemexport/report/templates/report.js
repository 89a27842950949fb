"use strict";
// Sorting and filtering for the tables; without this script the page shows the same, in the report's order.
const value = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.v ?? cell.textContent.trim();
  if (text === "" || text === "–") return null;
  // Shapes sort by what they hold, shares as numbers.
  const number = text.replace(/ %$/, "").split(" × ").reduce((product, part) => product * Number(part), 1);
  return Number.isNaN(number) ? text : number;
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    if (heading.classList.contains("plain")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const first = heading.classList.contains("text") ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? other : first;
      for (const each of headings) each.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : sign * compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

for (const table of document.querySelectorAll("table.tensors")) {
  const input = document.createElement("input");
  input.className = "filter";
  input.type = "search";
  input.placeholder = "filter by name, e.g. down_proj";
  input.setAttribute("aria-label", "filter tensors by name");
  input.addEventListener("input", () => {
    for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.includes(input.value.trim());
  });
  table.parentElement.before(input);
}

// A point's numbers stand below its picture, where a finger does not hide them; a second tap follows the link.
for (const figure of document.querySelectorAll("figure")) {
  const readout = figure.querySelector(".readout");
  const tips = [...figure.querySelectorAll(".tip")];
  const show = (tip) => {
    for (const each of tips) each.classList.toggle("shown", each === tip);
    // A number and its unit stay on one line.
    readout.textContent = tip.querySelector("title").textContent.replace(/(\d) (?=\S)/g, "$1\u00a0");
  };
  for (const tip of tips) {
    let touched = false;
    tip.addEventListener("pointerdown", (event) => {
      touched = event.pointerType === "touch" && !tip.classList.contains("shown");
    });
    tip.addEventListener("click", (event) => {
      if (touched) event.preventDefault();
      show(tip);
    });
    tip.addEventListener("pointerenter", (event) => event.pointerType === "touch" || show(tip));
    tip.addEventListener("focus", () => touched || tip.matches(":focus-visible") && show(tip));
  }
}

const unfold = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", unfold);
unfold();
