// Part 2: elements for texts, sections, records, curves and the tooltip. Texts become text nodes, never markup.

// ---- Elements and text ----

function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Invisible characters and those that change the text direction. Joiners and tag letters belong to emoji.
const ODD = /[ \n]|(?![\u200c\u200d\u{e0020}-\u{e007f}])[\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Cs}\p{Zl}\p{Zp}\p{Zs}]/gu;
const ODD_NAMES = { "\t": "\u21e5", "\r": "CR" };

/** Appends text[start:end]. CSS makes odd characters visible, so that the text content stays the same. */
function appendText(parent, text, start = 0, end = text.length) {
  let reached = start;
  for (const match of text.slice(start, end).matchAll(ODD)) {
    const [character] = match;
    const index = start + match.index;
    const isInner = index > 0 && index < text.length - 1 && text[index - 1] !== " " && text[index + 1] !== " ";
    if (character === " " && isInner) continue;
    if (index > reached) parent.append(text.slice(reached, index));
    let shown;
    if (character === " ") shown = make("i", "space", " ");
    else if (character === "\n") shown = make("i", "line", "\n");
    else {
      shown = make("bdi", "odd", character);
      const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      shown.dataset.name = ODD_NAMES[character] ?? `U+${code}`;
    }
    parent.append(shown);
    reached = index + character.length;
  }
  if (reached < end) parent.append(text.slice(reached, end));
  return parent;
}

const makeText = (name, className, text) => appendText(make(name, className), text);

function makeTable(className, header, rows) {
  const cells = (tag, texts) => texts.map((text, index) => makeText(index ? tag : "th", "", text));
  const body = make("tbody", "", ...rows.map((row) => make("tr", "", ...cells("td", row))));
  const table = make("table", className, body);
  if (header) table.prepend(make("thead", "", make("tr", "", ...cells("th", header))));
  return table;
}

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "\u2013");
const round = (number) => (Number(number.toFixed(6)) + 0).toFixed(6); // + 0 turns -0 into 0
const showChange = (number) => `${number > 0 ? "+" : ""}${round(number)}`;

/** A log-prob with 6 decimals, or all that the file has if it has more. */
const showLogp = (logp) => (Number(round(logp)) === logp ? round(logp) : String(logp));

// ---- Records ----

const LEVELS = [0.1, 0.5, 1, 2, 4]; // lower bounds of the five shades, in nats

function shade(token, ratio) {
  if (ratio === null) return;
  const level = LEVELS.filter((bound) => Math.abs(ratio) >= bound).length;
  if (level) token.classList.add(`${ratio > 0 ? "p" : "n"}${level}`);
}

/** The largest change among the tokens of a piece; null if unknown. */
function findLargest(ratios, side, piece) {
  const changes = ratios ? listIndices(side, piece).map((index) => ratios[index]) : [];
  return changes.reduce((largest, change) => (Math.abs(change) > Math.abs(largest ?? 0) ? change : largest), null);
}

function drawResponse(record, sideIndex, ratios, name) {
  const side = record.sides[sideIndex];
  const output = record.outputs[sideIndex];
  const box = make("div", "response");
  box.dir = "auto";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `${name}; arrow keys move between tokens`);
  const elements = [];
  let reached = 0;
  side.pieces.forEach((text, piece) => {
    // The space before a word is usually part of its token, but marking it would look wrong.
    const lead = /[^ ]/.test(text) ? text.search(/[^ ]/) : 0;
    appendText(box, output, reached, reached + lead);
    const token = make("span", "t");
    token.tabIndex = -1;
    token.dataset.piece = piece;
    appendText(token, output, reached + lead, reached + text.length);
    reached += text.length;
    if (side.has_end && piece === side.pieces.length - 1) token.classList.add("end");
    shade(token, findLargest(ratios, side, piece));
    box.append(token);
    elements.push(token);
  });
  record.tokens.push({ sideIndex, isTraining: ratios !== null && ratios === record.training, elements });
  return box;
}

function addRow(list, name, className, content) {
  const value = make("dd", className);
  if (typeof content === "string") appendText(value, content);
  else value.append(content);
  value.dir = "auto";
  list.append(make("div", "", make("dt", "", name), value));
}

function draw(record) {
  const { article, answer } = record;
  const list = make("dl", isPair ? "" : "beside");
  const [first, second] = record.sides;
  const judgment = [list, "Judgment", "judgment", record.judgment ?? "none (satisfactory)"];
  addRow(list, "Instruction", "instruction", record.instruction);
  if (isPair) {
    addRow(...judgment);
    addRow(list, "Before training", "", drawResponse(record, 0, first.ratios, "response, scored before training"));
    addRow(list, "After training", "", drawResponse(record, 1, second.ratios, "response, scored after training"));
    const training = record.training ? drawResponse(record, 0, record.training, "change by training") : null;
    const reason = first.pieces === second.pieces ? "no log-probs" : "the two models split it into different tokens";
    addRow(list, "Change by training", "", training ?? make("span", "soft", `unknown: ${reason}`));
  } else {
    addRow(list, "Response", "", drawResponse(record, 0, first.ratios, "response"));
    addRow(...judgment);
  }
  if (answer) {
    addRow(list, "New answer after training", "answer", answer.text);
    const [kind, verdict] = answer.judgment === null ? ["good", "\u2713 satisfactory"] : ["bad", `\u2717 ${answer.judgment}`];
    addRow(list, "Its judgment", `verdict ${kind}`, verdict);
  }
  article.replaceChildren(make("header", ""), list);
  article.style.minHeight = "";
  state.drawn.add(record);
  markFlags(record);
}

function forget(record) {
  if (!state.drawn.delete(record)) return;
  if (record.article.contains(document.activeElement)) record.article.focus({ preventScroll: true });
  record.article.style.minHeight = `${record.article.offsetHeight}px`; // keeps everything below in place
  record.article.replaceChildren();
  record.tokens = [];
}

function markFlags(record) {
  for (const { sideIndex, isTraining, elements } of record.tokens) {
    const side = record.sides[sideIndex];
    elements.forEach((element, piece) => {
      const indices = listIndices(side, piece);
      element.classList.toggle("flagged", !isTraining && indices.some((index) => isFlagged(record, side, index)));
      element.classList.toggle("wrong", indices.some((index) => side.wrong?.has(index)));
    });
  }
  const facts = [`#${record.number}`, record.is_satisfactory ? "\u2713 satisfactory" : "\u2717 unsatisfactory"];
  if (record.group) facts.splice(1, 0, record.group);
  record.sides.forEach((side, sideIndex) => {
    const { flagged, hits } = countFlags(record, side);
    const known = side.wrong ? `, ${hits} of ${side.wrong.size} wrong tokens found` : "";
    const name = isPair ? `${sideNames[sideIndex]}: ` : "";
    facts.push(`${name}${flagged} of ${count(side.numTokens, "token")} flagged${known}`);
  });
  if (record.sides.some((side) => side.isEdited)) facts.push("flags differ from eq. 5 (edited?)");
  record.article.firstChild.replaceChildren(...facts.map((fact) => makeText("span", "", fact)));
}

// ---- Sections, legend and settings: drawn once ----

function drawSection({ caption, header, rows, light, dark, alt }) {
  if (!rows) {
    const image = make("img", "");
    Object.assign(image, { alt, width: 700 });
    Object.assign(image.dataset, { light, dark: dark ?? light });
    return image; // setTheme chooses its source
  }
  const table = makeTable("figures", header, rows);
  table.prepend(makeText("caption", "", caption));
  return make("div", "wide", table);
}

const LEAST_SIGNAL = 0.3; // below it flags are called noise

/** How far the flags of one file can be trusted: the numbers and what they mean. */
function drawSensitivity(known, name) {
  const { flag_signal: signal, pairwise, noise } = known;
  const share = (value) => `${(100 * value).toFixed(1)}%`;
  const level = make("strong", noise ? "bad" : "good", signal === null ? "undefined" : signal.toFixed(2).replace("-", "\u2212"));
  const gauge = makeSvg("svg", { class: "gauge", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  const width = 100 * Math.max(0, Math.min(1, signal ?? 0));
  const x = 100 * LEAST_SIGNAL;
  gauge.append(
    makeSvg("rect", { class: "back", width: 100, height: 10, rx: 2 }),
    makeSvg("rect", { class: noise ? "bad" : "good", width, height: 10, rx: 2 }),
    makeSvg("line", { x1: x, x2: x, y1: 0, y2: 10 }),
  );
  const meaning =
    ` ${share(known.flagged_share_own)} of the tokens are flagged under the records\u2019 own judgments, ` +
    `${share(known.flagged_share_foreign)} under those of other records. 1: only its own judgment flags a response, ` +
    `0: any judgment does. Pairwise ${pairwise.toFixed(2)} (${count(known.num_records, "record")}).`;
  const line = make("p", "", make("b", "", name ? `Flag signal, ${name}` : "Flag signal"), gauge, level);
  line.append(make("span", "soft", meaning));
  return line;
}

function drawScale() {
  const step = (text, level) => make("span", `t ${level}`, text);
  const down = LEVELS.map((bound, index) => step(`\u2212${bound}`, `n${index + 1}`)).reverse();
  const steps = [...down, make("span", "t", "0"), ...LEVELS.map((bound, index) => step(`+${bound}`, `p${index + 1}`))];
  byId("scale").append(...steps.flatMap((shown) => [shown, " "]));
}

function drawSettings() {
  const names = Object.keys(data.settings[0]);
  const rows = data.settings.map((settings) => names.map((name) => String(settings[name])));
  const table = makeTable("", names.map((name) => name.replaceAll("_", " ")), rows);
  byId("settings").append(make("div", "wide", table));
}

// ---- Curves ----

const CURVES = { left: 46, right: 484, top: 32, bottom: 182 };
const LINES = { precision: "precision", recall: "recall", share: "share flagged" };

function makeSvg(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

const findX = (step) => CURVES.left + ((CURVES.right - CURVES.left) * step) / (THRESHOLDS.length - 1);
const findY = (share) => CURVES.bottom - (CURVES.bottom - CURVES.top) * share;

function drawCurves() {
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const y = findY(share);
    parts.push(makeSvg("line", { class: "grid", x1: CURVES.left, x2: CURVES.right, y1: y, y2: y }));
    parts.push(makeSvg("text", { x: CURVES.left - 6, y: y + 4, "text-anchor": "end" }, `${100 * share}%`));
  }
  for (const threshold of [1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100]) {
    const x = findX(findStep(threshold));
    parts.push(makeSvg("text", { x, y: CURVES.bottom + 18, "text-anchor": "middle" }, String(threshold)));
  }
  const middle = (CURVES.left + CURVES.right) / 2;
  parts.push(makeSvg("text", { x: middle, y: CURVES.bottom + 38, "text-anchor": "middle" }, "threshold \u03bb"));
  const curves = sideNames.map((_, sideIndex) => measureCurve(state.listed, sideIndex));
  const isKnown = (name) => curves.some((points) => points.some((point) => point[name] !== null));
  const names = Object.keys(LINES).filter(isKnown);
  names.forEach((name, column) => {
    const x = CURVES.left + 140 * column;
    parts.push(makeSvg("path", { class: `curve ${name}`, d: `M${x} 12h24` }));
    parts.push(makeSvg("text", { x: x + 30, y: 16 }, LINES[name]));
  });
  curves.forEach((points, sideIndex) => {
    for (const name of names) {
      const known = points.filter((point) => point[name] !== null);
      const corners = known.map((point) => `${findX(point.step).toFixed(1)} ${findY(point[name]).toFixed(1)}`);
      const kind = isPair && sideIndex === 0 ? "curve thin" : "curve";
      if (corners.length) parts.push(makeSvg("path", { class: `${kind} ${name}`, d: `M${corners.join("L")}` }));
    }
  });
  parts.push(makeSvg("line", { id: "marker", y1: CURVES.top - 4, y2: CURVES.bottom }));
  byId("curves").replaceChildren(...parts);
  moveMarker();
}

let curvesTimer = 0;

/** Draws the curves once input pauses: sorting all tokens takes longer than a keystroke may. */
function scheduleCurves() {
  clearTimeout(curvesTimer);
  curvesTimer = setTimeout(drawCurves, 120);
}

function moveMarker() {
  const x = findX(findStep(state.threshold ?? storedThresholds[0]));
  byId("marker")?.setAttribute("x1", x);
  byId("marker")?.setAttribute("x2", x);
}

/** The step at which the curves were clicked. */
function findClicked(event) {
  const box = byId("curves").getBoundingClientRect();
  const x = ((event.clientX - box.left) * byId("curves").viewBox.baseVal.width) / box.width;
  const last = THRESHOLDS.length - 1;
  return Math.round(Math.max(0, Math.min(last, (last * (x - CURVES.left)) / (CURVES.right - CURVES.left))));
}

// ---- Tooltip: the exact numbers of a token ----

const tip = byId("tip");
let pointed = null;

function hideTip() {
  tip.hidden = true;
  document.querySelectorAll(".paired").forEach((element) => element.classList.remove("paired"));
  pointed?.classList.remove("pointed");
  pointed?.removeAttribute("aria-describedby");
  pointed = null;
}

function showTip(element) {
  if (pointed === element) return;
  hideTip();
  pointed = element;
  const record = records[element.closest("article").dataset.index];
  const piece = Number(element.dataset.piece);
  const { sideIndex } = record.tokens.find(({ elements }) => elements[piece] === element);
  element.classList.add("pointed");
  element.setAttribute("aria-describedby", "tip");
  const isShared = isPair && record.sides[0].pieces === record.sides[1].pieces;
  if (isShared) {
    for (const { elements } of record.tokens) if (elements[piece] !== element) elements[piece].classList.add("paired");
  }
  const sideIndices = isShared ? [0, 1] : [sideIndex];
  tip.replaceChildren();
  listIndices(record.sides[sideIndex], piece).forEach((index, number, { length }) => {
    if (length > 1) tip.append(make("p", "", `token ${number + 1} of ${length} here`));
    tip.append(describeToken(record, sideIndices, index));
  });
  if (!tip.firstChild) tip.append(make("p", "", "no token covers this text"));
  tip.hidden = false;
  placeTip(element.getClientRects()[0] ?? element.getBoundingClientRect());
}

function placeTip(box) {
  const { offsetWidth: width, offsetHeight: height } = tip;
  const isBelow = box.bottom + 8 + height < innerHeight || box.top < height + 8;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  tip.style.top = `${isBelow ? box.bottom + 8 : box.top - height - 8}px`;
}

/** Keeps the tooltip at its token while scrolling. */
function followToken() {
  if (!pointed) return;
  const box = pointed.getBoundingClientRect();
  if (box.bottom < 0 || box.top > innerHeight) hideTip();
  else placeTip(box);
}

function describeToken(record, sideIndices, index) {
  const sides = sideIndices.map((sideIndex) => record.sides[sideIndex]);
  const hasChange = sides.length === 2;
  const rows = [];
  const addValues = (name, format, column) => {
    const values = sides.map((side) => format(side) ?? "\u2013");
    const isKnown = hasChange && column && sides.every((side) => side[column]);
    const change = isKnown ? showChange(sides[1][column][index] - sides[0][column][index]) : "";
    rows.push([name, ...values, ...(hasChange ? [change] : [])]);
  };
  addValues("log p without", (side) => side.without && showLogp(side.without[index]), "without");
  if (sides.some((side) => side.reference)) {
    const isPraise = sides.some((side) => side.settings.contrast === "perfect");
    addValues(isPraise ? 'log p with "Perfect."' : "log p with other judgments", (side) => side.reference && showLogp(side.reference[index]));
  }
  addValues("log p with", (side) => side.with && showLogp(side.with[index]), "with");
  addValues("difference", (side) => side.ratios && showChange(side.ratios[index]), "ratios");
  addValues("times as likely", (side) => side.ratios && showFactor(side.ratios[index]));
  addValues("flagged", (side) => (isFlagged(record, side, index) ? "yes" : "no"));
  if (sides.some((side) => isFlagged(record, side, index))) {
    addValues("weight", (side) => findWeight(record, side, index));
  }
  const { wrong } = sides[0];
  if (wrong) rows.push(["annotated as wrong", wrong.has(index) ? "yes" : "no", ...(hasChange ? ["", ""] : [])]);
  const names = ["", ...sideIndices.map((sideIndex) => sideNames[sideIndex]), ...(hasChange ? ["change"] : [])];
  return makeTable("", isPair ? names : null, rows);
}

function showFactor(ratio) {
  const factor = Math.exp(ratio);
  return factor >= 0.001 && factor < 10000 ? factor.toFixed(4) : factor.toExponential(3);
}

/** The weight of a flagged token (eq. 6): stored in the file or, at another threshold, computed. */
function findWeight(record, side, index) {
  if (!isFlagged(record, side, index)) return null;
  const { unlikelihood_weight: alpha, gamma } = side.settings;
  const isStored = state.threshold === null || !side.ratios;
  const weight = isStored ? side.weights[side.flagged.indexOf(index)] : alpha * Math.exp(gamma * side.with[index]);
  return String(Number(weight.toPrecision(6)));
}
