"use strict";
document.documentElement.classList.add("scripted");

function sortBy(table, column, ascending) {
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return ascending ? order : -order;
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compare));
  fold(table);
}

function fold(table) {
  const shown = Number(table.dataset.rows || Infinity);
  [...table.tBodies[0].rows].forEach((row, index) => row.classList.toggle("beyond", index >= shown));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.className = "sort";
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const current = head.getAttribute("aria-sort");
      const ascending = current ? current === "descending" : column === 0;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortBy(table, column, ascending);
    });
  });
  const rows = table.tBodies[0].rows.length;
  if (rows > Number(table.dataset.rows || Infinity)) {
    fold(table);
    table.classList.add("folded");
    const button = document.createElement("button");
    button.className = "all";
    button.type = "button";
    const name = () => { button.textContent = table.classList.contains("folded") ? `Show all ${rows}` : "Show fewer"; };
    name();
    button.addEventListener("click", () => { table.classList.toggle("folded"); name(); });
    table.parentElement.after(button);
  }
}

for (const input of document.querySelectorAll("input[data-filter]")) {
  const table = document.getElementById(input.dataset.filter);
  const folded = table.classList.contains("folded");
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    table.classList.toggle("folded", folded && !wanted);
    for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}

for (const heat of document.querySelectorAll(".heat")) {
  const svg = heat.querySelector("svg");
  const here = svg.querySelector(".here");
  const output = heat.querySelector("output");
  const cells = [...svg.querySelectorAll(".hit, .miss")].map((cell) => ({
    x: cell.x.baseVal.value, y: cell.y.baseVal.value, title: cell.querySelector("title").textContent,
  }));
  const read = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const distance = (cell) => (cell.x + 5 - point.x) ** 2 + (cell.y + 5 - point.y) ** 2;
    const nearest = cells.reduce((best, cell) => (distance(cell) < distance(best) ? cell : best));
    here.setAttribute("x", nearest.x);
    here.setAttribute("y", nearest.y);
    output.textContent = nearest.title;
  };
  if (cells.length) for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, read);
}
