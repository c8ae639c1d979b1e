// The trade-off plot, drawn at the size it is shown in, so that its texts keep theirs. Colour is the variant, shape the
// skip scheme; a filled mark keeps the limits, a small cross breaks one, a hollow mark rests on a figure with a doubt.
const SVG = "http://www.w3.org/2000/svg";
const EDGE = { left: 74, right: 16, top: 14, bottom: 46 };
const HIGH = 340;
const LETTER = 6.8; // pixels of a label's character, on average
const NARROW = 560; // below, labels are ranks alone
const SHAPES = [
  "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z", "M-4.5-4.5H4.5V4.5H-4.5Z", "M0-5.5L5.5 4.5H-5.5Z",
  "M-5-2.5L-2.5-5L0-2.5L2.5-5L5-2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0Z", "M0-6L6 0L0 6L-6 0Z", "M0 5.5L5.5-4.5H-5.5Z",
];
const STAR = "M0-7L2-2L7-2L3 1.5L4.5 7L0 3.5L-4.5 7L-3 1.5L-7-2L-2-2Z"; // a model that is not of the suite
const CROSS = "M-2.5-2.5L2.5 2.5M2.5-2.5L-2.5 2.5";

function drawn(tag, attributes, ...inside) {
  const made = document.createElementNS(SVG, tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  made.append(...inside);
  return made;
}

/** Round values between two, at most five: bytes in powers of two, else 1, 2 and 5 in steps of an axis' own kind. */
function ticksOf({ low, high, unit, log }) {
  const within = (values) => values.filter((value) => value >= low && value <= high);
  const whole = (from, to) => Array.from({ length: Math.max(0, to - from + 1) }, (_, at) => from + at);
  if (!log) {
    const rough = 10 ** Math.floor(Math.log10((high - low) / 2));
    const steps = [0.5, 1, 2, 5, 10].map((lead) => lead * rough);
    const all = steps.map((step) => within(whole(Math.ceil(low / step), Math.floor(high / step)).map((at) => at * step)));
    return all.find((values) => values.length <= 5) ?? [];
  }
  const base = unit === "bytes" ? 2 : 10;
  const powers = whole(Math.floor(Math.log(low) / Math.log(base)), Math.ceil(Math.log(high) / Math.log(base)));
  const leads = base === 2 ? [[1, 1.25, 1.5, 1.75], [1, 1.5], [1]] : [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 3], [1]];
  const sets = leads.map((each) => powers.flatMap((power) => each.map((lead) => lead * base ** power)));
  for (const step of [2, 3, 5, 10]) sets.push(powers.filter((power) => power % step === 0).map((power) => base ** power));
  return sets.map(within).find((values) => values.length <= 5) ?? [];
}

function tickWords(value, unit) {
  const text = FORMATS[unit === "macs" ? "count" : unit](value);
  return text.replace(/\.0+(?= |$)|(\.\d*?)0+(?= |$)/, "$1");
}

/** An axis with its span over the points, some room, and the way from a value to a pixel. */
function axisOver(axis, points, from, to) {
  const values = points.map((point) => point[axis.side]);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const log = axis.log && low > 0;
  const room = log ? (high / low) ** 0.06 || 1.3 : (high - low) * 0.08 || 1;
  [low, high] = log ? [low / Math.max(room, 1.05), high * Math.max(room, 1.05)] : [low - room, high + room];
  const scale = log ? Math.log : (value) => value;
  const at = (value) => from + ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (to - from);
  return { ...axis, low, high, log, at };
}

function drawAxis(axis, box, across) {
  const marks = ticksOf(axis).flatMap((value) => {
    const at = axis.at(value).toFixed(1);
    const line = across ? { x1: at, x2: at, y1: box.top, y2: box.bottom } : { x1: box.left, x2: box.right, y1: at, y2: at };
    const place = across ? { x: at, y: box.bottom + 17, "text-anchor": "middle" } : { x: box.left - 6, y: Number(at) + 4, "text-anchor": "end" };
    return [drawn("line", { class: "grid", ...line }), drawn("text", place, tickWords(value, axis.unit))];
  });
  const middle = across ? (box.left + box.right) / 2 : (box.top + box.bottom) / 2;
  const place = across
    ? { x: middle, y: box.bottom + 38 }
    : { x: 0, y: 0, transform: `translate(13 ${middle}) rotate(-90)` };
  return [...marks, drawn("text", { ...place, "text-anchor": "middle" }, axis.title)];
}

/** The part of the plot that is over a limit on one of its axes: hatched, with a line and its words. */
function drawLimit(axis, box, across) {
  if (axis.most === undefined || axis.most >= axis.high) return [];
  const at = Math.min(Math.max(axis.at(Math.max(axis.most, axis.low)), box.left * across), across ? box.right : box.bottom);
  const [width, height] = across ? [box.right - at, box.bottom - box.top] : [box.right - box.left, at - box.top];
  const over = { x: across ? at : box.left, y: box.top, width, height };
  const line = across ? { x1: at, x2: at, y1: box.top, y2: box.bottom } : { x1: box.left, x2: box.right, y1: at, y2: at };
  const left = across && at > (box.left + box.right) / 2;
  const place = across ? { x: at + (left ? -5 : 5), y: box.bottom - 7 } : { x: box.right - 5, y: at + 14 };
  const end = across && !left ? "start" : "end";
  return [
    drawn("rect", { class: "over", fill: "url(#hatch)", ...over }), drawn("line", { class: "most", ...line }),
    drawn("text", { class: "told", "text-anchor": end, ...place }, `at most ${axis.limitWords}`),
  ];
}

function drawPoint(point, x, y, looks) {
  const shape = point.standing === "breaks" ? CROSS : point.variant ? SHAPES[looks.skips.indexOf(point.skip) % SHAPES.length] : STAR;
  const colour = point.variant ? `var(--c${(looks.variants.indexOf(point.variant) % 6) + 1})` : "currentColor";
  const kind = point.doubtful ? "hollow" : point.standing;
  const place = `translate(${x.at(point.x).toFixed(1)} ${y.at(point.y).toFixed(1)})`;
  return drawn("path", { class: kind, d: shape, transform: place, style: `--colour:${colour}` }, drawn("title", {}, point.told));
}

/** The networks that no other one beats in low x and high y, as steps; of those that keep the limits, without a doubt. */
function drawFront(points, x, y) {
  const sound = points.filter((point) => point.standing === "keeps" && !point.doubtful);
  const kept = [];
  for (const point of sound.sort((left, right) => left.x - right.x || right.y - left.y)) {
    if (!kept.length || point.y > kept.at(-1).y) kept.push(point);
  }
  const steps = kept.map((point, at) => (at ? `H${x.at(point.x).toFixed(1)}V` : `M${x.at(point.x).toFixed(1)} `) + y.at(point.y).toFixed(1));
  return kept.length > 1 ? [drawn("path", { class: "front", d: steps.join("") })] : [];
}

/** Rank and name beside each of the best, where there is room; the rank alone where there is not. */
function drawLabels(points, x, y, box) {
  const best = points.filter((point) => point.rank).sort((left, right) => left.rank - right.rank);
  const taken = best.map((point) => ({ x: x.at(point.x) - 6, y: y.at(point.y) - 6, width: 12, height: 12 }));
  const free = (spot) => spot.x >= box.left && spot.x + spot.width <= box.right && spot.y >= box.top && spot.y + spot.height <= box.bottom
    && !taken.some((each) => spot.x < each.x + each.width && each.x < spot.x + spot.width && spot.y < each.y + each.height && each.y < spot.y + spot.height);
  return best.flatMap((point) => {
    const names = box.right > NARROW ? [`${point.rank} ${point.label}`, `${point.rank}`] : [`${point.rank}`];
    const [px, py] = [x.at(point.x), y.at(point.y)];
    for (const text of names) {
      const width = text.length * LETTER + 4;
      for (const [left, top] of [[8, -8], [-8 - width, -8], [-width / 2, -24], [-width / 2, 8], [8, -22], [8, 8], [-8 - width, -22], [-8 - width, 8]]) {
        const spot = { x: px + left, y: py + top, width, height: 15 };
        if (!free(spot)) continue;
        taken.push(spot);
        return [drawn("text", { class: "name", x: (spot.x + 2).toFixed(1), y: (spot.y + 12).toFixed(1) }, text)];
      }
    }
    return [];
  });
}

/** Draw points {x, y, standing, doubtful, rank, label, told, variant, skip} into an SVG; with a front where up is a gain. */
function drawPlot(svg, points, across, up, looks) {
  const wide = svg.parentElement.clientWidth;
  const box = { left: EDGE.left, right: wide - EDGE.right, top: EDGE.top, bottom: HIGH - EDGE.bottom };
  svg.setAttribute("viewBox", `0 0 ${wide} ${HIGH}`);
  svg.querySelectorAll(":scope > g").forEach((each) => each.remove());
  if (!points.length) return;
  const x = axisOver({ ...across, side: "x" }, points, box.left, box.right);
  const y = axisOver({ ...up, side: "y" }, points, box.bottom, box.top);
  const layers = { breaks: 0, unknown: 1, keeps: 2 };
  const above = (point) => (point.rank ? 3 : layers[point.standing]);
  const marks = [...points].sort((left, right) => above(left) - above(right)).map((point) => drawPoint(point, x, y, looks));
  svg.append(drawn("g", { "aria-hidden": "true" },
    ...drawAxis(x, box, true), ...drawAxis(y, box, false), ...drawLimit(x, box, true), ...drawLimit(y, box, false),
    ...(up.gain ? drawFront(points, x, y) : []), ...marks, ...drawLabels(points, x, y, box),
  ));
}
