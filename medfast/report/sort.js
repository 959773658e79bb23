// Makes every table sortable: the heads of its columns become buttons. A number is in data-sort;
// what is empty comes last in either direction.
"use strict";

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table.tBodies[0], heads, column));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });
}

function sort(body, heads, column) {
  const rows = [...body.rows].map((row) => [row, key(row.cells[column])]);
  // Of numbers the greatest are asked for first.
  const first = rows.some(([, value]) => typeof value === "number") ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = heads[column].getAttribute("aria-sort") === first ? other : first;
  heads.forEach((head) => head.setAttribute("aria-sort", "none"));
  heads[column].setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  rows.sort(([, a], [, b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  });
  body.append(...rows.map(([row]) => row));
}

function key(cell) {
  const number = cell.dataset.sort;
  if (number === undefined) return cell.textContent.trim();
  return number === "" ? "" : Number(number);
}
