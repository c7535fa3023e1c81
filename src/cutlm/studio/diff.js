// What an improved response changes, word by word.

import { appendText, make } from "./text.js";

const MAX_CELLS = 4_000_000; // of the table of common subsequences; beyond, the changed part is shown as one change

const split = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];

/** The parts of two texts in order: { kind: "same" | "del" | "ins", text }. */
export function diffWords(before, after) {
  const [ones, others] = [split(before), split(after)];
  let start = 0;
  while (start < ones.length && start < others.length && ones[start] === others[start]) start++;
  let end = 0;
  while (end < Math.min(ones.length, others.length) - start && ones.at(-1 - end) === others.at(-1 - end)) end++;
  const parts = [];
  const add = (kind, words) => {
    const text = words.join("");
    if (!text) return;
    if (parts.at(-1)?.kind === kind) parts.at(-1).text += text;
    else parts.push({ kind, text });
  };
  add("same", ones.slice(0, start));
  const [middle, otherMiddle] = [ones.slice(start, ones.length - end), others.slice(start, others.length - end)];
  for (const [kind, word] of alignWords(middle, otherMiddle)) add(kind, [word]);
  add("same", ones.slice(ones.length - end));
  return parts;
}

/** The longest common subsequence of two lists of words, as [kind, word]. */
function alignWords(ones, others) {
  const replaced = [...ones.map((word) => ["del", word]), ...others.map((word) => ["ins", word])];
  if (ones.length * others.length > MAX_CELLS) return replaced;
  const width = others.length + 1;
  const lengths = new Uint16Array((ones.length + 1) * width);
  for (let row = ones.length - 1; row >= 0; row--) {
    for (let column = others.length - 1; column >= 0; column--) {
      const cell = row * width + column;
      lengths[cell] =
        ones[row] === others[column] ? lengths[cell + width + 1] + 1 : Math.max(lengths[cell + width], lengths[cell + 1]);
    }
  }
  const aligned = [];
  let [row, column] = [0, 0];
  while (row < ones.length && column < others.length) {
    const cell = row * width + column;
    if (ones[row] === others[column]) {
      aligned.push(["same", ones[row]]);
      row++;
      column++;
    } else if (lengths[cell + width] >= lengths[cell + 1]) aligned.push(["del", ones[row++]]);
    else aligned.push(["ins", others[column++]]);
  }
  return [...aligned, ...ones.slice(row).map((word) => ["del", word]), ...others.slice(column).map((word) => ["ins", word])];
}

export function drawDiff(before, after) {
  return diffWords(before, after).map(({ kind, text }) => appendText(make(kind === "same" ? "span" : kind, ""), text));
}
