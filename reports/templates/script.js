// The report is complete without this: it adds the download, the choice, and sorting and searching in the table of all rows.
let allRows = null; // the table, once its library is unpacked
let keptLabels = null; // the networks whose rows are shown; null: all
let figureRules = []; // [column, comparison, number] that each shown row keeps
const COMPARISONS = {
  "<": (left, right) => left < right, "<=": (left, right) => left <= right,
  ">": (left, right) => left > right, ">=": (left, right) => left >= right,
};

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

/** "latency < 50ms, MACs >= 1G" as rules; a column is named by how its head starts. Throws what is not understood. */
function rulesOf(text, heads) {
  return text.split(",").map((each) => each.trim()).filter(Boolean).map((each) => {
    const [, name, sign, figure] = /^(.*?)\s*([<>]=?)\s*(.*)$/.exec(each) ?? [];
    const at = heads.findIndex((head) => name && head.textContent.toLowerCase().includes(name.toLowerCase()));
    if (at < 0) throw new Error(name ? `no column is called ${name}` : `${each}: write a column, <, <=, > or >=, and a figure`);
    const unit = heads[at].dataset.unit;
    const number = unit in UNITS ? parsed(figure, unit) : Number(figure || NaN);
    if (Number.isNaN(number)) throw new Error(`${figure || "nothing"} is no figure: write ${SPELT[unit] ?? "a number"}`);
    return [at, sign, number];
  });
}

/** Keep the rows whose figures keep every rule of the field, and say what is not understood; then nothing is kept back. */
function filterFigures(heads) {
  const [field, told] = ["figures-only", "figures-told"].map((name) => document.getElementById(name));
  field.addEventListener("input", () => {
    try {
      [figureRules, told.textContent] = [rulesOf(field.value, heads), ""];
    } catch (error) {
      [figureRules, told.textContent] = [[], error.message];
    }
    allRows.draw();
  });
  document.getElementById("rows-by-figures").hidden = false;
}

/** Whether a row of the table is shown, by the choice and by the field of figures; one without the figure is not. */
function isShown(row) {
  const figure = (at) => Number(row.cells[at].dataset.order || NaN);
  const kept = !keptLabels || keptLabels.has(row.dataset.label);
  return kept && figureRules.every(([at, sign, number]) => COMPARISONS[sign](figure(at), number));
}

async function unpackTable() {
  const packed = Uint8Array.from(atob(document.getElementById("datatables").textContent), (each) => each.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const code = new Blob([await new Response(stream).text()], { type: "text/javascript" });
  const { default: DataTable } = await import(URL.createObjectURL(code));
  const labels = { search: "Search ", info: "_TOTAL_ rows", infoFiltered: "of _MAX_", infoEmpty: "no rows" };
  const missingLast = (sign) => (left, right) => (left === "") - (right === "") || sign * (left - right);
  Object.assign(DataTable.ext.type.order, { "figure-asc": missingLast(1), "figure-desc": missingLast(-1) });
  const table = new DataTable("#all-rows", {
    columnDefs: [{ targets: "n", type: "figure" }], paging: false, order: [], autoWidth: false, language: labels,
    layout: { topStart: "search", topEnd: "info", bottomStart: null, bottomEnd: null },
  });
  table.search.fixed("limits", (text, cells, at) => isShown(table.row(at).node()));
  allRows = table.draw();
  filterFigures([...document.querySelectorAll("#all-rows thead th")]);
  document.getElementById("rows-too")?.removeAttribute("hidden");
}

saveRaw();
startChoice(filterRows);
unpackTable().catch(() => { /* an old browser keeps the plain table */ });
