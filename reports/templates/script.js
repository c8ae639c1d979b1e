(() => {
  // The report is complete without this: it adds sorting and searching to the table of all rows, and the download.
  const raw = document.getElementById("raw");
  const link = document.getElementById("download");
  link.href = URL.createObjectURL(new Blob([raw.textContent], { type: "application/json" }));
  const packed = Uint8Array.from(atob(document.getElementById("datatables").textContent), (each) => each.charCodeAt(0));
  const unpack = async () => {
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const code = new Blob([await new Response(stream).text()], { type: "text/javascript" });
    return import(URL.createObjectURL(code));
  };
  unpack().then(({ default: DataTable }) => {
    const labels = { search: "Search ", info: "_TOTAL_ rows", infoFiltered: "of _MAX_", infoEmpty: "no rows" };
    new DataTable("#all-rows", {
      paging: false, order: [], autoWidth: false, language: labels,
      layout: { topStart: "search", topEnd: "info", bottomStart: null, bottomEnd: null },
    });
  }).catch(() => { /* an old browser keeps the plain table */ });
})();
