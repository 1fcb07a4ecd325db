"use strict";
// Tables sort by a click, or Enter/Space, on a header; absent numbers stay at the end either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells]; // a row of group headings may precede
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const numeric = head.dataset.kind === "number";
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const descending = now ? now === "ascending" : numeric; // a number is first sorted from the top
      const sign = descending ? -1 : 1;
      const key = (row) => row.cells[column].dataset.v ?? "";
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true }));
      };
      body.append(...[...body.rows].sort(compare));
      table.classList.add("sorted");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}
// A table that is wider than its frame says so.
const marked = new ResizeObserver((entries) => {
  for (const { target } of entries) target.classList.toggle("wide", target.scrollWidth > target.clientWidth);
});
document.querySelectorAll(".scroll").forEach((frame) => marked.observe(frame));
// What is folded away on the screen belongs on paper.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
