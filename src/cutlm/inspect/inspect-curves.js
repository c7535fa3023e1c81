// Third part: how precision, recall and the share of flagged tokens follow the threshold, as a picture.

// The steps of the slider: from 1 to 100, the finer the nearer to 1, and short to write.
const GRAINS = [[1, 0.005], [1.2, 0.01], [1.5, 0.02], [3, 0.05], [5, 0.1], [10, 0.2], [20, 0.5], [50, 2]];
const THRESHOLDS = listThresholds();
const CURVES = { left: 46, right: 484, top: 32, bottom: 186 };
const LINES = { precision: "precision", recall: "recall", share: "share flagged" };

function listThresholds() {
  const steps = new Set();
  for (let part = 0; part <= 1; part += 0.0025) {
    const threshold = 100 ** (part * part);
    const grain = GRAINS.findLast(([from]) => threshold >= from)[1];
    steps.add(Number((Math.round(threshold / grain) * grain).toFixed(3)));
  }
  return [...steps];
}

/** The step that is nearest to a threshold. */
function findStep(threshold) {
  const distances = THRESHOLDS.map((step) => Math.abs(Math.log(step / Math.max(1, threshold))));
  return distances.indexOf(Math.min(...distances));
}

function makeSvg(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

/** The share of flagged tokens, and precision and recall where they are known, at each step of the threshold. */
function measureCurve(listed, index) {
  const columns = { all: [], known: [], hits: [] };
  let numWrong = 0;
  for (const record of listed) {
    const side = record.sides[index];
    if (record.is_satisfactory) continue;
    numWrong += side.wrong?.size ?? 0;
    // Without log-probs a token stays flagged, or not, at every threshold, as in the figures.
    const ratios = side.ratios ?? Float64Array.from(side.stored, (flag) => (flag ? Infinity : -Infinity));
    ratios.forEach((ratio, place) => {
      columns.all.push(ratio);
      if (side.wrong) columns.known.push(ratio);
      if (side.wrong?.has(place)) columns.hits.push(ratio);
    });
  }
  const sorted = Object.fromEntries(
    Object.entries(columns).map(([name, ratios]) => [name, Float64Array.from(ratios).sort()]),
  );
  return THRESHOLDS.map((threshold, step) => {
    const bound = Math.log(threshold);
    const [all, known, hits] = [sorted.all, sorted.known, sorted.hits].map((ratios) => countAbove(ratios, bound));
    return {
      step,
      share: sorted.all.length ? all / sorted.all.length : null,
      precision: known ? hits / known : null,
      recall: numWrong ? hits / numWrong : null,
    };
  });
}

/** How many numbers of a sorted array are larger than a bound. */
function countAbove(sorted, bound) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] > bound) high = middle;
    else low = middle + 1;
  }
  return sorted.length - low;
}

const placeStep = (step) => CURVES.left + ((CURVES.right - CURVES.left) * step) / (THRESHOLDS.length - 1);
const placeShare = (share) => CURVES.bottom - (CURVES.bottom - CURVES.top) * share;

function drawCurves() {
  const picture = byId("curves");
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const y = placeShare(share);
    parts.push(makeSvg("line", { class: "grid", x1: CURVES.left, x2: CURVES.right, y1: y, y2: y }));
    parts.push(makeSvg("text", { x: CURVES.left - 6, y: y + 4, "text-anchor": "end" }, `${100 * share}%`));
  }
  for (const threshold of [1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 100]) {
    const x = placeStep(findStep(threshold));
    parts.push(makeSvg("text", { x, y: CURVES.bottom + 18, "text-anchor": "middle" }, String(threshold)));
  }
  const curves = sideNames.map((_, index) => measureCurve(state.listed, index));
  const isKnown = (name) => curves.some((points) => points.some((point) => point[name] !== null));
  const names = Object.keys(LINES).filter(isKnown);
  names.forEach((name, place) => {
    const x = CURVES.left + 140 * place;
    parts.push(makeSvg("path", { class: `curve ${name}`, d: `M${x} 12h24` }));
    parts.push(makeSvg("text", { x: x + 30, y: 16 }, LINES[name]));
  });
  curves.forEach((points, index) => {
    for (const name of names) {
      const known = points.filter((point) => point[name] !== null);
      const corners = known.map((point) => `${placeStep(point.step).toFixed(1)} ${placeShare(point[name]).toFixed(1)}`);
      const kind = isPair && index === 0 ? "curve thin" : "curve";
      if (corners.length) parts.push(makeSvg("path", { class: `${kind} ${name}`, d: `M${corners.join("L")}` }));
    }
  });
  parts.push(makeSvg("line", { id: "marker", y1: CURVES.top - 4, y2: CURVES.bottom }));
  picture.replaceChildren(...parts);
  markThreshold();
}

let curvesPlan = 0;

/** Draws the curves once the page is at rest: sorting all tokens takes longer than a letter of a search. */
function planCurves() {
  clearTimeout(curvesPlan);
  curvesPlan = setTimeout(drawCurves, 120);
}

function markThreshold() {
  const x = placeStep(findStep(state.threshold ?? storedThresholds[0]));
  byId("marker")?.setAttribute("x1", x);
  byId("marker")?.setAttribute("x2", x);
}

/** The step at which the picture was pressed. */
function findPressed(event) {
  const box = byId("curves").getBoundingClientRect();
  const x = ((event.clientX - box.left) * byId("curves").viewBox.baseVal.width) / box.width;
  const last = THRESHOLDS.length - 1;
  return Math.round(Math.max(0, Math.min(last, (last * (x - CURVES.left)) / (CURVES.right - CURVES.left))));
}
