"use strict";
// The page of `cutlm inspect`, first part: the data that cutlm.report.columns made, flags by eq. 5, and sums of them.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
byId("data").remove(); // its text is as large as all the rest
const isPair = data.names.length === 2;
const sideNames = isPair ? ["before", "after"] : [""];
// The threshold is null while flags are those of the file; drawn are the records that have elements.
const state = { threshold: null, listed: [], current: null, drawn: new Set() };

const records = data.records.map((record, index) => {
  const [first] = record.sides;
  record.sides.forEach((side) => prepareSide(side, first));
  record.number = index + 1;
  record.outputs = record.sides.map((side) => side.pieces.join(""));
  record.haystack = `${record.instruction}\n${record.outputs[0]}\n${record.judgment ?? ""}`.toLowerCase();
  record.training = isPair ? findTraining(...record.sides) : null;
  record.tokens = [];
  return record;
});

function prepareSide(side, first) {
  if (!side.pieces) Object.assign(side, { pieces: first.pieces, sizes: first.sizes, has_end: first.has_end });
  let numTokens = 0;
  side.starts = side.pieces.map((_, index) => {
    const start = numTokens;
    numTokens += side.sizes ? side.sizes[index] : 1;
    return start;
  });
  side.starts.push(numTokens);
  side.numTokens = numTokens;
  side.made = data.made[side.made];
  side.ratios =
    side.with && side.without ? Float64Array.from(side.with, (logp, place) => logp - side.without[place]) : null;
  side.stored = new Map(side.flagged.map((place, index) => [place, side.weights[index]]));
  side.wrong = side.wrong && new Set(side.wrong);
}

/** Of each token, what training changed: log p without the judgment, after - before. */
function findTraining(before, after) {
  const isSame = before.pieces === after.pieces && before.without && after.without;
  return isSame ? Float64Array.from(after.without, (logp, place) => logp - before.without[place]) : null;
}

/** Whether a token is flagged: eq. 5 at the threshold that was set, or as the file has it. */
function isFlagged(record, side, place) {
  if (state.threshold === null || !side.ratios) return side.stored.has(place);
  return !record.is_satisfactory && side.ratios[place] > Math.log(state.threshold);
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

function sumUp(listed, index) {
  const sum = { tokens: 0, flagged: 0, unflagged: 0, known: 0, hits: 0, found: 0, wrong: 0, fixed: 0 };
  for (const record of listed) {
    const side = record.sides[index];
    const { flagged, hits } = countFlags(record, side);
    sum.flagged += flagged;
    if (record.is_satisfactory) continue;
    sum.tokens += side.numTokens;
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
