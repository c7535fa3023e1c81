// Part 2: elements for sections, records, curves and the tooltip.

// ---- Records ----

function drawResponse(record, sideIndex, ratios, name) {
  const side = record.sides[sideIndex];
  const output = record.outputs[sideIndex];
  const { box, elements } = drawPieces(side, output, ratios, `${name}; arrow keys move between tokens`);
  for (const element of elements) element.tabIndex = -1;
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

/** How far the flags of one file can be trusted: the numbers and what they mean. */
function drawSensitivity(known, name) {
  const { flag_signal: signal, pairwise, noise } = known;
  const share = (value) => `${(100 * value).toFixed(1)}%`;
  const meaning =
    ` ${share(known.flagged_share_own)} of the tokens are flagged under the records\u2019 own judgments, ` +
    `${share(known.flagged_share_foreign)} under those of other records. 1: only its own judgment flags a response, ` +
    `0: any judgment does. Pairwise ${pairwise.toFixed(2)} (${count(known.num_records, "record")}).`;
  const line = make("p", "", make("b", "", name ? `Flag signal, ${name}` : "Flag signal"), ...drawGauge(signal, Boolean(noise)));
  line.append(make("span", "soft", meaning));
  return line;
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
  placeTip(tip, element.getClientRects()[0] ?? element.getBoundingClientRect());
}

/** Keeps the tooltip at its token while scrolling. */
function followToken() {
  if (!pointed) return;
  const box = pointed.getBoundingClientRect();
  if (box.bottom < 0 || box.top > innerHeight) hideTip();
  else placeTip(tip, box);
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

/** The weight of a flagged token (eq. 6): stored in the file or, at another threshold, computed. */
function findWeight(record, side, index) {
  if (!isFlagged(record, side, index)) return null;
  const { unlikelihood_weight: alpha, gamma } = side.settings;
  const isStored = state.threshold === null || !side.ratios;
  const weight = isStored ? side.weights[side.flagged.indexOf(index)] : alpha * Math.exp(gamma * side.with[index]);
  return String(Number(weight.toPrecision(6)));
}
