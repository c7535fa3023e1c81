// Elements for texts and numbers, for the token page and the studio. Texts become text nodes, never markup.

export const byId = (id) => document.getElementById(id);

export function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Invisible characters and those that change the text direction. Joiners and tag letters belong to emoji.
const ODD = /[ \n]|(?![\u200c\u200d\u{e0020}-\u{e007f}])[\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Cs}\p{Zl}\p{Zp}\p{Zs}]/gu;
const ODD_NAMES = { "\t": "\u21e5", "\r": "CR" };

/** Appends text[start:end]. CSS makes odd characters visible, so that the text content stays the same. */
export function appendText(parent, text, start = 0, end = text.length) {
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

export const makeText = (name, className, text) => appendText(make(name, className), text);

export function makeTable(className, header, rows) {
  const cells = (tag, texts) => texts.map((text, index) => makeText(index ? tag : "th", "", text));
  const body = make("tbody", "", ...rows.map((row) => make("tr", "", ...cells("td", row))));
  const table = make("table", className, body);
  if (header) table.prepend(make("thead", "", make("tr", "", ...cells("th", header))));
  return table;
}

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
export const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "\u2013");
const round = (number) => (Number(number.toFixed(6)) + 0).toFixed(6); // + 0 turns -0 into 0
export const showChange = (number) => `${number > 0 ? "+" : ""}${round(number)}`;

/** A log-prob with 6 decimals, or all that the file has if it has more. */
export const showLogp = (logp) => (Number(round(logp)) === logp ? round(logp) : String(logp));

export function makeSvg(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
