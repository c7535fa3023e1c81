// Second part: a record as elements, and the exact figures of a token. Text becomes text nodes, never markup.

// ---- Elements and text ----

function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// What cannot be seen, or turns the direction of what follows; joiners and the letters of flags are part of emoji.
const ODD = /[ \n]|(?![\u200c\u200d\u{e0020}-\u{e007f}])[\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Cs}\p{Zl}\p{Zp}\p{Zs}]/gu;
const ODD_NAMES = { "\t": "\u21e5", "\r": "CR" };

/** Appends text[start:end], what cannot be seen in it named by the style; the text stays the same. */
function appendText(parent, text, start = 0, end = text.length) {
  let reached = start;
  for (const match of text.slice(start, end).matchAll(ODD)) {
    const [character] = match;
    const place = start + match.index;
    const isInner = place > 0 && place < text.length - 1 && text[place - 1] !== " " && text[place + 1] !== " ";
    if (character === " " && isInner) continue;
    if (place > reached) parent.append(text.slice(reached, place));
    let shown;
    if (character === " ") shown = make("i", "space", " ");
    else if (character === "\n") shown = make("i", "line", "\n");
    else {
      shown = make("bdi", "odd", character);
      const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      shown.dataset.name = ODD_NAMES[character] ?? `U+${code}`;
    }
    parent.append(shown);
    reached = place + character.length;
  }
  if (reached < end) parent.append(text.slice(reached, end));
  return parent;
}

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "\u2013");
const round = (number) => (Number(number.toFixed(6)) + 0).toFixed(6); // + 0: not -0
const showChange = (number) => `${number > 0 ? "+" : ""}${round(number)}`;

/** A log-prob with its digits in the file: 6 after the point, or more where it has more. */
const show = (logp) => (Number(round(logp)) === logp ? round(logp) : String(logp));

// ---- A record ----

function shade(token, ratio) {
  if (ratio === null) return;
  const level = data.levels.filter((bound) => Math.abs(ratio) >= bound).length;
  if (level) token.classList.add(`${ratio > 0 ? "p" : "n"}${level}`);
}

/** The largest change of the tokens that a piece of text stands for; null where it is not known. */
function findLargest(ratios, side, piece) {
  const changes = ratios ? listPlaces(side, piece).map((place) => ratios[place]) : [];
  return changes.reduce((largest, change) => (Math.abs(change) > Math.abs(largest ?? 0) ? change : largest), null);
}

function drawResponse(record, index, ratios, name) {
  const side = record.sides[index];
  const output = record.outputs[index];
  const box = make("div", "response");
  box.dir = "auto";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `${name}; arrow keys go from token to token`);
  const tokens = [];
  let reached = 0;
  side.pieces.forEach((text, piece) => {
    // A space before a word is most often part of its token, but of no mark.
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
    tokens.push(token);
  });
  record.tokens.push({ index, isTraining: ratios !== null && ratios === record.training, elements: tokens });
  return box;
}

function pair(list, name, className, content) {
  const value = make("dd", className);
  if (typeof content === "string") appendText(value, content);
  else value.append(content);
  value.dir = "auto";
  list.append(make("div", "", make("dt", "", name), value)); // what belongs together stays together in every layout
}

function draw(record) {
  const { article } = record;
  const list = make("dl", isPair ? "" : "beside");
  const [first, second] = record.sides;
  const judgment = [list, "Judgment", "judgment", record.judgment ?? "none: nothing is wrong"];
  pair(list, "Instruction", "instruction", record.instruction);
  if (isPair) {
    pair(...judgment);
    pair(list, "Before", "", drawResponse(record, 0, first.ratios, "response, before training"));
    pair(list, "After", "", drawResponse(record, 1, second.ratios, "response, after training"));
    const training = record.training ? drawResponse(record, 0, record.training, "what training changed") : null;
    const reason = first.pieces === second.pieces ? "without log-probs" : "split into other tokens";
    pair(list, "Training changed", "", training ?? make("span", "soft", `not known: ${reason}`));
  } else {
    pair(list, "Response", "", drawResponse(record, 0, first.ratios, "response"));
    pair(...judgment);
  }
  article.replaceChildren(make("header", ""), list);
  article.style.minHeight = "";
  state.drawn.add(record);
  markFlags(record);
}

function forget(record) {
  if (!state.drawn.delete(record)) return;
  if (record.article.contains(document.activeElement)) record.article.focus({ preventScroll: true });
  record.article.style.minHeight = `${record.article.offsetHeight}px`; // what is below stays where it is
  record.article.replaceChildren();
  record.tokens = [];
}

function markFlags(record) {
  for (const { index, isTraining, elements } of record.tokens) {
    const side = record.sides[index];
    elements.forEach((element, piece) => {
      const places = listPlaces(side, piece);
      const flagged = !isTraining && places.some((place) => isFlagged(record, side, place));
      element.classList.toggle("flagged", flagged);
      element.classList.toggle("wrong", places.some((place) => side.wrong?.has(place)));
    });
  }
  const facts = [`#${record.number}`, record.is_satisfactory ? "\u2713 satisfactory" : "\u2717 unsatisfactory"];
  record.sides.forEach((side, index) => {
    const { flagged, hits } = countFlags(record, side);
    const known = side.wrong ? `, ${hits} of ${side.wrong.size} wrong ones found` : "";
    const name = isPair ? `${sideNames[index]}: ` : "";
    facts.push(`${name}${flagged} of ${count(side.numTokens, "token")} flagged${known}`);
  });
  if (record.sides.some((side) => side.isEdited)) facts.push("flags in the file are not eq. 5\u2019s: edited?");
  record.article.firstChild.replaceChildren(...facts.map((fact) => make("span", "", fact)));
}

// ---- What is drawn once ----

function drawScale() {
  const step = (level, name) => make("span", `t ${name}`, level);
  const { levels } = data;
  const steps = [...levels.map((bound, index) => step(`\u2212${bound}`, `n${index + 1}`)).reverse()];
  steps.push(make("span", "t", "0"), ...levels.map((bound, index) => step(`+${bound}`, `p${index + 1}`)));
  byId("scale").append("less likely ", ...steps.flatMap((shown) => [shown, " "]), "likelier, in nats");
}

function drawMade() {
  const names = Object.keys(data.made[0]);
  const head = make("tr", "", ...names.map((name) => make("th", "", name.replaceAll("_", " "))));
  const rows = data.made.map((made) => make("tr", "", ...names.map((name) => make("td", "", String(made[name])))));
  byId("made").lastElementChild.append(make("table", "", make("thead", "", head), make("tbody", "", ...rows)));
}

// ---- Exact figures of a token ----

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
  const drawn = record.tokens.find(({ elements }) => elements[piece] === element);
  element.classList.add("pointed");
  element.setAttribute("aria-describedby", "tip");
  const isShared = isPair && record.sides[0].pieces === record.sides[1].pieces;
  if (isShared) {
    for (const { elements } of record.tokens) if (elements[piece] !== element) elements[piece].classList.add("paired");
  }
  const indices = isShared ? [0, 1] : [drawn.index];
  const side = record.sides[drawn.index];
  tip.replaceChildren();
  listPlaces(side, piece).forEach((place, index, places) => {
    if (places.length > 1) tip.append(make("p", "", `token ${index + 1} of ${places.length} here`));
    tip.append(describeToken(record, indices, place));
  });
  if (!tip.firstChild) tip.append(make("p", "", "no token claims this text"));
  tip.hidden = false;
  placeTip(element.getClientRects()[0] ?? element.getBoundingClientRect());
}

function placeTip(box) {
  const { offsetWidth: width, offsetHeight: height } = tip;
  const isBelow = box.bottom + 8 + height < innerHeight || box.top < height + 8;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  tip.style.top = `${isBelow ? box.bottom + 8 : box.top - height - 8}px`;
}

/** While the page scrolls: the figures go with their token, and with it out of sight. */
function followToken() {
  if (!pointed) return;
  const box = pointed.getBoundingClientRect();
  if (box.bottom < 0 || box.top > innerHeight) hideTip();
  else placeTip(box);
}

function describeToken(record, indices, place) {
  const sides = indices.map((index) => record.sides[index]);
  const hasChange = sides.length === 2;
  const body = make("tbody", "");
  const row = (name, values, changes) => {
    const cells = values.map((value) => make("td", "", value ?? "\u2013"));
    if (hasChange) cells.push(make("td", "", changes ?? ""));
    body.append(make("tr", "", make("th", "", name), ...cells));
  };
  const difference = (column) => {
    const isKnown = hasChange && sides.every((side) => side[column]);
    return isKnown ? showChange(sides[1][column][place] - sides[0][column][place]) : "";
  };
  row("log p without", sides.map((side) => side.without && show(side.without[place])), difference("without"));
  row("log p with", sides.map((side) => side.with && show(side.with[place])), difference("with"));
  row("difference", sides.map((side) => side.ratios && showChange(side.ratios[place])), difference("ratios"));
  row("times as likely", sides.map((side) => side.ratios && showFactor(side.ratios[place])), "");
  row("flagged", sides.map((side) => (isFlagged(record, side, place) ? "yes" : "no")), "");
  if (sides.some((side) => isFlagged(record, side, place))) {
    row("weight", sides.map((side) => findWeight(record, side, place)), "");
  }
  const [side] = sides;
  if (side.wrong) row("marked as wrong", [side.wrong.has(place) ? "yes" : "no"], "");
  const table = make("table", "", body);
  if (isPair) {
    const names = ["", ...indices.map((index) => sideNames[index]), ...(hasChange ? ["change"] : [])];
    table.prepend(make("thead", "", make("tr", "", ...names.map((name) => make("th", "", name)))));
  }
  return table;
}

function showFactor(ratio) {
  const factor = Math.exp(ratio);
  return factor >= 0.001 && factor < 10000 ? factor.toFixed(4) : factor.toExponential(3);
}

/** The weight of a flagged token (eq. 6), of the file or, at another threshold, from its numbers. */
function findWeight(record, side, place) {
  if (!isFlagged(record, side, place)) return null;
  const { unlikelihood_weight: alpha, gamma } = side.made;
  const isStored = state.threshold === null || !side.ratios;
  const weight = isStored ? side.weights[side.flagged.indexOf(place)] : alpha * Math.exp(gamma * side.with[place]);
  return String(Number(weight.toPrecision(6)));
}
