// The report is complete without this: it adds the download, the choice, and sorting and searching in the table of all rows.
let allRows = null; // the table, once its library is unpacked
let keptLabels = null; // the networks whose rows are shown; null: all

function filterRows(labels) {
  if (labels === keptLabels) return;
  keptLabels = labels;
  allRows?.draw();
}

function saveRaw() {
  const raw = document.getElementById("raw");
  const blob = new Blob([raw.textContent], { type: "application/json" });
  document.getElementById("download").href = URL.createObjectURL(blob);
}

async function unpackTable() {
  const packed = Uint8Array.from(atob(document.getElementById("datatables").textContent), (each) => each.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const code = new Blob([await new Response(stream).text()], { type: "text/javascript" });
  const { default: DataTable } = await import(URL.createObjectURL(code));
  const labels = { search: "Search ", info: "_TOTAL_ rows", infoFiltered: "of _MAX_", infoEmpty: "no rows" };
  const table = new DataTable("#all-rows", {
    paging: false, order: [], autoWidth: false, language: labels,
    layout: { topStart: "search", topEnd: "info", bottomStart: null, bottomEnd: null },
  });
  table.search.fixed("limits", (text, cells, at) => !keptLabels || keptLabels.has(table.row(at).node().dataset.label));
  allRows = table.draw();
  document.getElementById("rows-too")?.removeAttribute("hidden");
}

saveRaw();
startChoice(filterRows);
unpackTable().catch(() => { /* an old browser keeps the plain table */ });
