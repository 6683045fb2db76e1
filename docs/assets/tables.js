// Puts a field above every long table that shows the rows with all words typed into it.
const LONG = 40;

function addFilter(table) {
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  const form = document.createElement("form");
  form.className = "table-filter";
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "Filter rows, e.g. llama or partly";
  input.setAttribute("aria-label", "Show rows that contain");
  const count = document.createElement("output");
  form.append(input, count);

  function show() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.value = `${shown} of ${rows.length} rows`;
    return shown;
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  input.addEventListener("input", show);
  table.before(form);
  input.value = new URLSearchParams(location.search).get("h") ?? ""; // the words of a search that led here
  if (show() === 0) input.value = "";
  show();
}

for (const table of document.querySelectorAll(".md-typeset table")) {
  if (table.tBodies.length && table.tBodies[0].rows.length >= LONG) addFilter(table);
}
