// The tokens of a response: elements shaded by log ratio, thresholds and the gauge, for the token page and the studio.

import { appendText, make, makeSvg } from "./text.js";

const LEVELS = [0.1, 0.5, 1, 2, 4]; // lower bounds of the five shades, in nats
const SHADES = LEVELS.flatMap((_, index) => [`p${index + 1}`, `n${index + 1}`]);
const LEAST_SIGNAL = 0.3; // below it flags are called noise

/** Adds the number of tokens of a side, and the first token of each piece if a piece may have several. */
export function countTokens(side) {
  side.numTokens = side.sizes ? side.sizes.reduce((sum, size) => sum + size, 0) : side.pieces.length;
  let reached = 0;
  side.starts = side.sizes?.map((size) => (reached += size) - size);
}

/** The indices of the tokens that a piece shows: one, or several that share a character. */
export function listIndices(side, piece) {
  if (!side.sizes) return [piece];
  return Array.from({ length: side.sizes[piece] }, (_, index) => side.starts[piece] + index);
}

export function subtract(ones, others) {
  const differences = new Float64Array(ones.length);
  for (let index = 0; index < ones.length; index++) differences[index] = ones[index] - others[index];
  return differences;
}

export function shade(token, ratio) {
  token.classList.remove(...SHADES);
  if (ratio === null) return;
  const level = LEVELS.filter((bound) => Math.abs(ratio) >= bound).length;
  if (level) token.classList.add(`${ratio > 0 ? "p" : "n"}${level}`);
}

/** The largest change among the tokens of a piece; null if unknown. */
export function findLargest(ratios, side, piece) {
  const changes = ratios ? listIndices(side, piece).map((index) => ratios[index]) : [];
  return changes.reduce((largest, change) => (Math.abs(change) > Math.abs(largest ?? 0) ? change : largest), null);
}

/** Draws a response: a box, and an element for each piece, shaded by the log ratios if there are any. */
export function drawPieces(side, output, ratios, label) {
  const box = make("div", "response");
  box.dir = "auto";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", label);
  const elements = [];
  let reached = 0;
  side.pieces.forEach((text, piece) => {
    // The space before a word is usually part of its token, but marking it would look wrong.
    const lead = /[^ ]/.test(text) ? text.search(/[^ ]/) : 0;
    appendText(box, output, reached, reached + lead);
    const token = make("span", "t");
    token.dataset.piece = piece;
    appendText(token, output, reached + lead, reached + text.length);
    reached += text.length;
    if (side.has_end && piece === side.pieces.length - 1) token.classList.add("end");
    shade(token, findLargest(ratios, side, piece));
    box.append(token);
    elements.push(token);
  });
  return { box, elements };
}

export function drawScale() {
  const step = (text, level) => make("span", `t ${level}`, text);
  const down = LEVELS.map((bound, index) => step(`\u2212${bound}`, `n${index + 1}`)).reverse();
  const steps = [...down, make("span", "t", "0"), ...LEVELS.map((bound, index) => step(`+${bound}`, `p${index + 1}`))];
  return steps.flatMap((shown) => [shown, " "]);
}

/** Draws a flag signal (null if undefined) as a bar with the line below which flags are noise, and as a number. */
export function drawGauge(signal, isNoise) {
  const kind = isNoise ? "bad" : "good";
  const gauge = makeSvg("svg", { class: "gauge", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  const width = 100 * Math.max(0, Math.min(1, signal ?? 0));
  const x = 100 * LEAST_SIGNAL;
  gauge.append(
    makeSvg("rect", { class: "back", width: 100, height: 10, rx: 2 }),
    makeSvg("rect", { class: kind, width, height: 10, rx: 2 }),
    makeSvg("line", { x1: x, x2: x, y1: 0, y2: 10 }),
  );
  return [gauge, make("strong", kind, signal === null ? "undefined" : signal.toFixed(2).replace("-", "\u2212"))];
}

// The steps of the slider: round numbers from 1 to 100, finer near 1.
const GRAINS = [[1, 0.005], [1.2, 0.01], [1.5, 0.02], [3, 0.05], [5, 0.1], [10, 0.2], [20, 0.5], [50, 2]];
export const THRESHOLDS = listThresholds();

function listThresholds() {
  const steps = new Set();
  for (let part = 0; part <= 1; part += 0.0025) {
    const threshold = 100 ** (part * part);
    const grain = GRAINS.findLast(([from]) => threshold >= from)[1];
    steps.add(Number((Math.round(threshold / grain) * grain).toFixed(3)));
  }
  return [...steps];
}

/** The step nearest to a threshold. */
export function findStep(threshold) {
  const distances = THRESHOLDS.map((step) => Math.abs(Math.log(step / Math.max(1, threshold))));
  return distances.indexOf(Math.min(...distances));
}

/** Places a tooltip below a token, or above it if there is no room. */
export function placeTip(tip, box) {
  const { offsetWidth: width, offsetHeight: height } = tip;
  const isBelow = box.bottom + 8 + height < innerHeight || box.top < height + 8;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  tip.style.top = `${isBelow ? box.bottom + 8 : box.top - height - 8}px`;
}

/** How many times as likely, from a log ratio. */
export function showFactor(ratio) {
  const factor = Math.exp(ratio);
  return factor >= 0.001 && factor < 10000 ? factor.toFixed(4) : factor.toExponential(3);
}
