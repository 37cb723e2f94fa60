// Rows are sorted by the heading that is pressed: numbers from high to low first, names from a to z, what is empty last.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.querySelectorAll("thead th")];
  headings.forEach((heading, column) => {
    const value = (body) => body.rows[0].querySelectorAll("[data-value]")[column].dataset.value;
    heading.querySelector("button").addEventListener("click", () => {
      const bodies = [...table.tBodies];
      const numbers = bodies.every((body) => !Number.isNaN(Number(value(body))));
      const first = numbers ? "descending" : "ascending";
      const second = numbers ? "ascending" : "descending";
      const order = heading.getAttribute("aria-sort") === first ? second : first;
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      bodies.sort((one, other) => {
        const [a, b] = [value(one), value(other)];
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (numbers ? a - b : a.localeCompare(b));
      });
      table.append(...bodies);
    });
  });
}
