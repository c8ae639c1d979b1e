// Base units to words and back, by the rules of bench/figures.py and bench/units.py: a test holds both sides together.
const DIGITS = 3;
const DECIMAL = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
const BINARY = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]];
const COUNTS = { "": 1, K: 1e3, M: 1e6, G: 1e9, T: 1e12 };
const UNITS = {
  bytes: { B: 1, KB: 1e3, MB: 1e6, GB: 1e9, KIB: 2 ** 10, MIB: 2 ** 20, GIB: 2 ** 30 },
  seconds: { us: 1e-6, "µs": 1e-6, ms: 1e-3, s: 1 },
  count: COUNTS,
  macs: COUNTS,
};
const SPELT = { bytes: "8GiB or 512MB", seconds: "15ms, 0.2s or 800us", count: "31M or 7.5k", macs: "50G or 300M" };

/** So many digits behind the point; a tie goes to the even digit, as in Python, where toFixed takes the larger one. */
function fixed(value, digits) {
  const exact = value.toFixed(100);
  const end = exact.length - 100 + digits;
  const below = exact.slice(0, digits ? end : end - 1);
  const tie = /^50*$/.test(exact.slice(end)) && "02468".includes(below.at(-1));
  return tie ? below : value.toFixed(digits);
}

/** So many significant digits, without an exponent. */
function rounded(value, digits = DIGITS) {
  if (value === 0) return "0";
  const exponent = Number(value.toExponential().split("e")[1]);
  return fixed(value, Math.max(0, digits - 1 - exponent));
}

function scaled(value, unit) {
  const [factor, prefix] = DECIMAL.find(([least]) => value >= least) ?? [1, ""];
  const number = factor > 1 ? rounded(value / factor) : String(Number(value.toPrecision(6)));
  return `${number} ${prefix}${unit}`.trimEnd();
}

function seconds(value) {
  if (value < 1e-3) return `${rounded(value * 1e6)} µs`;
  if (value < 1) return `${rounded(value * 1e3)} ms`;
  if (value < 100) return `${rounded(value)} s`;
  return `${Math.floor(Math.floor(value) / 60)} min ${Math.floor(value) % 60} s`;
}

function size(value) {
  const [factor, unit] = BINARY.find(([least]) => value >= least) ?? [1, "B"];
  return `${factor > 1 ? rounded(value / factor) : fixed(value, 0)} ${unit}`;
}

const FORMATS = {
  count: (value) => scaled(value, ""),
  macs: (value) => scaled(value, "MAC"),
  bytes: size,
  seconds,
  pixels: (value) => `${fixed(value, 0)} px`,
  channels: (value) => fixed(value, 0),
  score: (value) => String(Number(value.toPrecision(4))),
};

/** A number in words, with a tilde where it carries a doubt; a dash where there is none. */
function words(number, unit) {
  if (number === undefined) return "–";
  return (number.doubtful ? "~ " : "") + FORMATS[unit](number.value);
}

/** "64MiB", "15ms" or "3G" in base units; NaN for what is not understood. */
function parsed(text, unit) {
  const found = /^\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(\D*?)\s*$/.exec(unit === "seconds" ? text : text.toUpperCase());
  const factor = found && Object.hasOwn(UNITS[unit], found[2]) ? UNITS[unit][found[2]] : NaN;
  const value = found ? Number(found[1]) * factor : NaN;
  if (unit === "seconds") return value > 0 ? value : NaN;
  return unit === "bytes" && value < 1 ? NaN : Math.trunc(value);
}

function median(samples) {
  const sorted = [...samples].sort((left, right) => left - right);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
