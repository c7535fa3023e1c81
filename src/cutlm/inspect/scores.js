// The token page, part 1 (after text.js and tokens.js, which the studio shares): its data (made by page.py), flags by eq. 5 at any threshold, and counts of them.

const data = JSON.parse(byId("data").textContent);
byId("data").remove(); // its text is as large as everything else on the page
const isPair = data.names.length === 2;
const sideNames = isPair ? ["before", "after"] : [""];
// threshold: null means the flags stored in the file; drawn: the records that have elements right now.
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
  countTokens(side);
  side.settings = data.settings[side.settings];
  const reference = side.settings.contrast === "judgment" ? side.without : side.reference;
  side.ratios = side.with && reference ? subtract(side.with, reference) : null; // logarithms
  side.evidence = side.ratios && findEvidence(side, reference);
  side.stored = new Uint8Array(side.numTokens);
  for (const index of side.flagged) side.stored[index] = 1;
  side.wrong = side.wrong && new Set(side.wrong);
  // Stored flags that differ from eq. 5 at the stored threshold: someone edited them, or something else made them.
  side.isEdited = side.ratios !== null && hasOtherFlags(record, side, Math.log(side.settings.threshold));
}

/** What exceeds the logarithm of the threshold if a token is flagged: its log ratio and, weighted, its surprise. */
function findEvidence(side, reference) {
  const factor = 1 + side.settings.surprise_weight;
  const start = side.num_template_tokens ?? 0; // what the chat template writes is never flagged
  return side.ratios.map((_, index) => (index < start ? -Infinity : side.with[index] - factor * reference[index]));
}

function hasOtherFlags(record, side, bound) {
  return side.stored.some((flag, index) => exceeds(record, side, index, bound) !== Boolean(flag));
}

/** For each token, log p without the judgment after training minus before. */
function findTraining(before, after) {
  const isKnown = before.pieces === after.pieces && before.without && after.without;
  return isKnown ? subtract(after.without, before.without) : null;
}

/** Eq. 5; bound is the logarithm of the threshold. */
function exceeds(record, side, index, bound) {
  return !record.is_satisfactory && side.evidence[index] > bound;
}

function isFlagged(record, side, index) {
  if (state.threshold === null || !side.ratios) return Boolean(side.stored[index]);
  return exceeds(record, side, index, Math.log(state.threshold));
}

function countFlags(record, side) {
  const counts = { flagged: 0, hits: 0 };
  for (let index = 0; index < side.numTokens; index++) {
    if (!isFlagged(record, side, index)) continue;
    counts.flagged += 1;
    if (side.wrong?.has(index)) counts.hits += 1;
  }
  return counts;
}

/** Counts over the unsatisfactory records of a list, and over those of them with wrong_spans (known). */
function sumUp(listed, sideIndex) {
  const sum = { tokens: 0, flagged: 0, unflagged: 0, withoutLogps: 0, satisfactoryFlags: 0, edited: 0 };
  Object.assign(sum, { known: 0, hits: 0, found: 0, wrong: 0 });
  for (const record of listed) {
    const side = record.sides[sideIndex];
    const { flagged, hits } = countFlags(record, side);
    sum.edited += side.isEdited;
    if (record.is_satisfactory) {
      sum.satisfactoryFlags += flagged;
      continue;
    }
    sum.tokens += side.numTokens;
    sum.flagged += flagged;
    sum.unflagged += flagged === 0;
    sum.withoutLogps += !side.ratios;
    if (!side.wrong) continue;
    sum.known += 1;
    sum.hits += hits;
    sum.found += flagged;
    sum.wrong += side.wrong.size;
  }
  return sum;
}

// ---- Filters and orders ----

const hasFlag = (record) => record.sides.some((side) => countFlags(record, side).flagged > 0);
const FILTERS = {
  all: () => true,
  unsatisfactory: (record) => !record.is_satisfactory,
  satisfactory: (record) => record.is_satisfactory,
  unflagged: (record) => !record.is_satisfactory && !hasFlag(record),
  edited: (record) => record.sides.some((side) => side.isEdited),
};
const groups = [...new Set(records.map((record) => record.group))].filter(Boolean);
for (const group of groups) FILTERS[`group ${group}`] = (record) => record.group === group;

function hasText(record, query) {
  if (!query) return true;
  const texts = [record.instruction, record.outputs[0], record.judgment, record.answer?.text];
  record.haystack ??= texts.filter(Boolean).join("\n").toLowerCase();
  return record.haystack.includes(query);
}

// The record with the largest number comes first.
const ORDERS = {
  file: null,
  flagged: (record) => record.sides.reduce((sum, side) => sum + countFlags(record, side).flagged, 0),
  judgment: (record) => Math.max(...record.sides.map((side) => findPeak(side.ratios))),
  surprise: (record) => -findMean(record.sides[0].without),
  training: (record) => findPeak(record.training),
};
const findPeak = (ratios) => (ratios ?? []).reduce((peak, ratio) => Math.max(peak, Math.abs(ratio)), -1);
const findMean = (logps) => (logps?.length ? logps.reduce((sum, logp) => sum + logp, 0) / logps.length : Infinity);

// ---- Curves ----

/** Share of flagged tokens, precision and recall (null where unknown) at each step. */
function measureCurve(listed, sideIndex) {
  const columns = { all: [], known: [], hits: [] };
  let numWrong = 0;
  for (const record of listed) {
    const side = record.sides[sideIndex];
    if (record.is_satisfactory) continue;
    numWrong += side.wrong?.size ?? 0;
    // Without log-probs the stored flags hold at every threshold.
    const ratios = side.evidence ?? Float64Array.from(side.stored, (flag) => (flag ? Infinity : -Infinity));
    ratios.forEach((ratio, index) => {
      columns.all.push(ratio);
      if (side.wrong) columns.known.push(ratio);
      if (side.wrong?.has(index)) columns.hits.push(ratio);
    });
  }
  const sorted = Object.values(columns).map((ratios) => Float64Array.from(ratios).sort());
  return THRESHOLDS.map((threshold, step) => {
    const [all, known, hits] = sorted.map((ratios) => countAbove(ratios, Math.log(threshold)));
    return {
      step,
      share: sorted[0].length ? all / sorted[0].length : null,
      precision: known ? hits / known : null,
      recall: numWrong ? hits / numWrong : null,
    };
  });
}

function countAbove(sorted, bound) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] > bound) high = middle;
    else low = middle + 1;
  }
  return sorted.length - low;
}
