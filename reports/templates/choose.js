// The choice: the form's limits against the rows that the page carries. Its state stands in the address, after #choose.
const TOP = 5;
const OBJECTIVES = { // what is better where it is more, what decides between equals, and how it is written
  score: { then: ["reach", "width"], title: "score", unit: "score" },
  reach: { then: ["width"], title: "receptive field", unit: "pixels" },
  width: { then: ["reach"], title: "width", unit: "channels" },
};

/** The number of a metric of a case, as tables show it; undefined where there is none. */
function numberOf(results, metric) {
  const result = results[metric];
  const value = result?.samples ? median(result.samples) : NaN;
  if (!Number.isFinite(value) || value < 0) return undefined;
  return { value, doubtful: Boolean(result.outcome || result.note) };
}

/** One row per network: what it is, what it sees, and its costs in the main setting of each mode. */
function networksOf(raw, costs) {
  const [first] = Object.keys(raw.settings);
  const rows = new Map();
  for (const found of Object.values(raw.cases)) {
    const mode = Object.keys(raw.settings).find((each) => raw.settings[each] === found.setting);
    if (!mode) continue;
    const [variant, depth, width, skip] = found.axes ?? [];
    const fresh = { label: found.label, variant, depth, width, skip, score: raw.scores[found.label], costs: {} };
    const row = rows.get(found.label) ?? fresh;
    rows.set(found.label, row);
    row.reach ??= numberOf(found.results, "receptive_field")?.value;
    for (const cost of costs) {
      if ((cost.mode || first) === mode) row.costs[cost.name] = numberOf(found.results, cost.metric);
    }
  }
  return [...rows.values()];
}

/** What the form asks, read: limits in base units, those that cannot be read, and the rest as it stands. */
function questionOf(form, costs) {
  const asked = Object.fromEntries(new FormData(form));
  const shown = costs.filter((cost) => !cost.mode || !asked.mode || asked.mode === cost.mode);
  const given = shown.filter((cost) => cost.input.value.trim());
  const read = given.map((cost) => ({ ...cost, most: parsed(cost.input.value, cost.unit) }));
  const [limits, unread] = [read.filter(({ most }) => most >= 0), read.filter(({ most }) => Number.isNaN(most))];
  return { ...asked, shown, limits, unread, across: costs.find((cost) => cost.name === asked.x) };
}

/** Whether a network keeps the limits: "keeps", "breaks", or "unknown" where a figure is missing or carries a doubt. */
function standingOf(row, limits) {
  const sure = limits.map((limit) => ({ most: limit.most, number: row.costs[limit.name] })).filter(({ number }) => number && !number.doubtful);
  if (sure.some(({ most, number }) => number.value > most)) return "breaks";
  return sure.length === limits.length ? "keeps" : "unknown";
}

/** Best first: by the objective, then fewer MACs, then fewer parameters, and only then by name. */
function order(objective) {
  const less = (row, name) => row.costs[name]?.value ?? Infinity;
  return (left, right) => {
    for (const gain of [objective, ...OBJECTIVES[objective].then]) {
      const [one, other] = [left[gain] ?? -Infinity, right[gain] ?? -Infinity];
      if (one !== other) return one > other ? -1 : 1;
    }
    for (const name of ["MACs", "parameters"]) {
      if (less(left, name) !== less(right, name)) return less(left, name) < less(right, name) ? -1 : 1;
    }
    return left.label < right.label ? -1 : 1;
  };
}

/** The answer: the networks to choose from with their standing, and the best of those that keep the limits. */
function answer(rows, question) {
  const among = rows.filter((row) => !row.skip || !question.skips || row.skip === question.skips);
  for (const row of rows) row.standing = question.unread.length ? "unknown" : standingOf(row, question.limits);
  const keeping = among.filter((row) => row.standing === "keeps").sort(order(question.objective));
  return { rows, among, keeping, best: keeping.slice(0, TOP) };
}

/** The next wider or deeper network of the same kind. */
function nextOf(row, rows, axis) {
  const alike = ["variant", "depth", "width", "skip"].filter((name) => name !== axis);
  const more = rows.filter((each) => each[axis] > row[axis] && alike.every((name) => each[name] === row[name]));
  return more.reduce((best, each) => (best && best[axis] <= each[axis] ? best : each), undefined);
}

/** What one step along an axis takes: the limit that it crosses first, if costs grow by equal factors on the way. */
function stepWords(row, rows, axis, question) {
  const next = nextOf(row, rows, axis);
  if (!next) return row.variant ? `none ${axis === "width" ? "wider" : "deeper"}` : "–";
  const when = ({ name, most }) => Math.log(most / row.costs[name].value) / Math.log(next.costs[name].value / row.costs[name].value);
  const crossed = question.limits.filter(({ name, most }) => next.costs[name]?.value > most);
  const [first] = crossed.sort((left, right) => when(left) - when(right));
  const unknown = question.limits.find(({ name }) => !next.costs[name]);
  const { name, title, unit } = first ?? unknown ?? question.limits[0] ?? question.across;
  const figure = next.costs[name] ? words(next.costs[name], unit) : "not known";
  return `${axis} ${next[axis]}${first ? " breaks" : ":"} ${title}${first ? "," : ""} ${figure}`;
}

function made(tag, text, attributes = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...attributes });
}

/** The table of the best: its rank, its figures, what it sees, its score where there are any, and one step more. */
function fillTop(table, { rows, best }, question) {
  const scored = rows.some((row) => row.score !== undefined);
  const middle = [...question.shown.map((cost) => cost.title), "sees", ...(scored ? ["score"] : [])];
  const head = made("tr", "");
  head.append(...["rank", "network"].map((text) => made("th", text, { scope: "col" })));
  head.append(...middle.map((text) => made("th", text, { scope: "col", className: "n" })));
  head.append(...["made wider", "made deeper"].map((text) => made("th", text, { scope: "col" })));
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...best.map((row, at) => {
    const figures = question.shown.map((cost) => words(row.costs[cost.name], cost.unit));
    figures.push(row.reach === undefined ? "–" : FORMATS.pixels(row.reach));
    if (scored) figures.push(row.score === undefined ? "–" : FORMATS.score(row.score));
    const line = made("tr", "");
    line.append(made("td", String(at + 1)), made("th", row.label, { scope: "row" }));
    line.append(...figures.map((text) => made("td", text, { className: "n" })));
    line.append(...["width", "depth"].map((axis) => made("td", stepWords(row, rows, axis, question))));
    return line;
  }));
}

function plural(count, one) {
  return `${count} ${one}${count === 1 ? "" : "s"}`;
}

/** The answer in a sentence or three, for everybody and for who hears the page. */
function sentence({ among, keeping, best }, question) {
  const [wrong] = question.unread;
  if (wrong) return `${wrong.title}: "${wrong.input.value.trim()}" is not understood. Write ${SPELT[wrong.unit]}.`;
  const limits = question.limits.map(({ title, most, unit }) => `${title} ≤ ${FORMATS[unit](most)}`).join(", ");
  if (!limits) return `No limit yet: the best of all ${plural(among.length, "network")}.`;
  const unsure = among.filter((row) => row.standing === "unknown").length;
  const rest = unsure ? ` ${unsure} cannot be judged: a figure that is limited is missing or carries a doubt.` : "";
  const first = best.length ? ` The best is ${best[0].label}.` : "";
  return `${keeping.length} of ${plural(among.length, "network")} keep${keeping.length === 1 ? "s" : ""} ${limits}.${first}${rest}`;
}

/** The plot's axes: a cost across; up the objective, which is a gain, or another cost. */
function axesOf(question, costs) {
  const limited = (cost) => {
    const limit = question.limits.find(({ name }) => name === cost.name);
    return { ...cost, log: true, of: (row) => row.costs[cost.name], most: limit?.most, limitWords: limit && FORMATS[cost.unit](limit.most) };
  };
  const gain = question.objective;
  const value = (row) => (row[gain] === undefined ? undefined : { value: row[gain], doubtful: false });
  const objective = { ...OBJECTIVES[gain], log: false, gain: true, of: value };
  const up = costs.find((cost) => cost.name === question.y);
  return [limited(question.across), up ? limited(up) : objective];
}

/** What a network is in the plot: its place, its standing, and its words; undefined where it has no place. */
function pointOf(row, [across, up], best) {
  const [x, y] = [across.of(row), up.of(row)];
  if (!x || !y) return undefined;
  const told = `${row.label}: ${words(x, across.unit)} ${across.title}, ${words(y, up.unit)} ${up.title}`;
  return { ...row, told, x: x.value, y: y.value, doubtful: x.doubtful || y.doubtful, rank: best.indexOf(row) + 1 };
}

/** The state of the form as it stands in an address: what is not as it was at the start. */
function stateOf(form) {
  const fresh = (field) => (field.options ? [...field.options].find((each) => each.defaultSelected)?.value : field.defaultValue);
  const changed = [...form.elements].filter((field) => field.name && (field.type === "checkbox" ? field.checked : field.value !== fresh(field)));
  return new URLSearchParams(changed.map((field) => [field.name, field.value])).toString();
}

/** Put the state of an address into the form; names and values that it does not have are left. */
function restore(form, state) {
  form.reset();
  for (const [name, value] of new URLSearchParams(state)) {
    const field = form.elements.namedItem(name);
    if (field?.type === "checkbox") field.checked = true;
    else if (field?.options ? [...field.options].some((each) => each.value === value) : field?.name) field.value = value;
  }
}

const MARK = "#choose&"; // what an address with a state has in front of it

function stateInAddress() {
  return location.hash.startsWith(MARK) ? location.hash.slice(MARK.length) : "";
}

/** Answer whatever is changed, and write it into the address: an entry of the history per field, not per letter. */
function follow(section, form, show) {
  let typing = null;
  const changed = ({ type, target }) => {
    const state = stateOf(form);
    if (state !== stateInAddress()) {
      show();
      if (typing === target) location.replace(MARK + state);
      else location.hash = MARK + state;
    }
    typing = type === "change" ? null : target;
  };
  section.addEventListener("input", changed);
  section.addEventListener("change", changed);
  document.getElementById("anew").addEventListener("click", () => { location.hash = MARK; });
  window.addEventListener("hashchange", () => {
    const other = location.hash && !location.hash.startsWith(MARK); // an anchor of the page changes nothing
    if (other || stateInAddress() === stateOf(form)) return;
    restore(form, stateInAddress());
    show();
  });
}

function startChoice(filterRows) {
  const section = document.getElementById("choose");
  const form = document.getElementById("chooser");
  if (!form) return;
  const costs = [...form.querySelectorAll("input[data-metric]")].map((input) => ({ ...input.dataset, name: input.name, input }));
  const rows = networksOf(JSON.parse(document.getElementById("raw").textContent), costs);
  const looks = { variants: form.dataset.variants.split(" "), skips: form.dataset.skips.split(" ") };
  const [table, svg, told] = ["top", "live", "chosen"].map((name) => document.getElementById(name));
  const show = () => {
    const question = questionOf(form, costs);
    const found = answer(rows, question);
    for (const { name, input } of costs) {
      input.closest("div").hidden = !question.shown.some((cost) => cost.name === name);
      input.setAttribute("aria-invalid", question.unread.some((cost) => cost.name === name));
    }
    told.textContent = sentence(found, question);
    fillTop(table, found, question);
    const axes = axesOf(question, costs);
    drawPlot(svg, found.among.map((row) => pointOf(row, axes, found.best)).filter(Boolean), ...axes, looks);
    filterRows(question.rows ? new Set(found.keeping.map((row) => row.label)) : null);
  };
  document.querySelectorAll("[data-live]").forEach((each) => { each.hidden = false; });
  document.getElementById("round-limits")?.removeAttribute("open");
  form.addEventListener("submit", (event) => event.preventDefault());
  restore(form, stateInAddress());
  follow(section, form, show);
  new ResizeObserver(show).observe(svg.parentElement); // which calls it at once, too
  if (location.hash.startsWith(MARK)) section.scrollIntoView();
}
