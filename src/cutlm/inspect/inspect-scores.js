"use strict";
// The page of `cutlm inspect`, first part: the data that cutlm.inspect.columns made, flags by eq. 5, and sums of them.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
byId("data").remove(); // its text is as large as all the rest
const isPair = data.names.length === 2;
const sideNames = isPair ? ["before", "after"] : [""];
// The threshold is null while flags are those of the file; drawn are the records that have elements.
const state = { threshold: null, listed: [], current: null, drawn: new Set() };

const records = data.records.map((record, index) => {
  const [first] = record.sides;
  record.sides.forEach((side) => prepareSide(record, side, first));
  record.number = index + 1;
  record.outputs = record.sides.map((side) => side.pieces.join(""));
  record.training = isPair ? findTraining(...record.sides) : null;
  record.tokens = [];
  return record;
});

function prepareSide(record, side, first) {
  if (!side.pieces) Object.assign(side, { pieces: first.pieces, sizes: first.sizes, has_end: first.has_end });
  side.numTokens = side.sizes ? side.sizes.reduce((sum, size) => sum + size, 0) : side.pieces.length;
  let reached = 0;
  side.starts = side.sizes?.map((size) => (reached += size) - size);
  side.made = data.made[side.made];
  side.ratios = side.with && side.without ? subtract(side.with, side.without) : null;
  side.stored = new Uint8Array(side.numTokens);
  for (const place of side.flagged) side.stored[place] = 1;
  side.wrong = side.wrong && new Set(side.wrong);
  // Where eq. 5 at its own threshold gives other flags, a person edited these, or something else made them.
  side.isEdited = side.ratios !== null && hasOtherFlags(record, side, Math.log(side.made.threshold));
}

function hasOtherFlags(record, side, bound) {
  for (let place = 0; place < side.numTokens; place++) {
    if (findFlag(record, side, place, bound) !== Boolean(side.stored[place])) return true;
  }
  return false;
}

/** The places of the tokens that a piece of text stands for: one, but for the bytes of a character and their like. */
function listPlaces(side, piece) {
  if (!side.sizes) return [piece];
  return Array.from({ length: side.sizes[piece] }, (_, index) => side.starts[piece] + index);
}

function subtract(ones, others) {
  const differences = new Float64Array(ones.length);
  for (let place = 0; place < ones.length; place++) differences[place] = ones[place] - others[place];
  return differences;
}

/** Of each token, what training changed: log p without the judgment, after - before. */
function findTraining(before, after) {
  const isKnown = before.pieces === after.pieces && before.without && after.without;
  return isKnown ? subtract(after.without, before.without) : null;
}

/** Eq. 5: whether the judgment makes a token likelier by more than a threshold, which is given as a logarithm. */
function findFlag(record, side, place, bound) {
  return !record.is_satisfactory && side.ratios[place] > bound;
}

/** Whether a token is flagged: eq. 5 at the threshold that was set, or as the file has it. */
function isFlagged(record, side, place) {
  if (state.threshold === null || !side.ratios) return Boolean(side.stored[place]);
  return findFlag(record, side, place, Math.log(state.threshold));
}

function countFlags(record, side) {
  const counts = { flagged: 0, hits: 0 };
  for (let place = 0; place < side.numTokens; place++) {
    if (!isFlagged(record, side, place)) continue;
    counts.flagged += 1;
    if (side.wrong?.has(place)) counts.hits += 1;
  }
  return counts;
}

/** The flags of unsatisfactory records, and how right they are where `wrong_spans` tell. */
function sumUp(listed, index) {
  const sum = { tokens: 0, flagged: 0, unflagged: 0, fixed: 0, praised: 0, edited: 0 };
  Object.assign(sum, { known: 0, hits: 0, found: 0, wrong: 0 }); // of records with wrong_spans
  for (const record of listed) {
    const side = record.sides[index];
    const { flagged, hits } = countFlags(record, side);
    sum.edited += side.isEdited;
    if (record.is_satisfactory) {
      sum.praised += flagged;
      continue;
    }
    sum.tokens += side.numTokens;
    sum.flagged += flagged;
    sum.unflagged += flagged === 0;
    sum.fixed += !side.ratios;
    if (!side.wrong) continue;
    sum.known += 1;
    sum.hits += hits;
    sum.found += flagged;
    sum.wrong += side.wrong.size;
  }
  return sum;
}

// ---- Filters ----

const hasFlag = (record) => record.sides.some((side) => countFlags(record, side).flagged > 0);
const FILTERS = {
  all: () => true,
  unsatisfactory: (record) => !record.is_satisfactory,
  satisfactory: (record) => record.is_satisfactory,
  unflagged: (record) => !record.is_satisfactory && !hasFlag(record),
  edited: (record) => record.sides.some((side) => side.isEdited),
};

/** Whether a record's texts hold what is searched for, in any letter case. */
function hasText(record, query) {
  if (!query) return true;
  record.haystack ??= `${record.instruction}\n${record.outputs[0]}\n${record.judgment ?? ""}`.toLowerCase();
  return record.haystack.includes(query);
}

// ---- Orders: what goes first has the largest number ----

const ORDERS = {
  file: null,
  flagged: (record) => record.sides.reduce((sum, side) => sum + countFlags(record, side).flagged, 0),
  judgment: (record) => Math.max(...record.sides.map((side) => findPeak(side.ratios))),
  surprise: (record) => -findMean(record.sides[0].without),
  training: (record) => findPeak(record.training),
};
const findPeak = (ratios) => (ratios ?? []).reduce((peak, ratio) => Math.max(peak, Math.abs(ratio)), -1);
const findMean = (logps) => (logps?.length ? logps.reduce((sum, logp) => sum + logp, 0) / logps.length : Infinity);
