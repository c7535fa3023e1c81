// Last part: the list of records, the figures above it, and all that a person can do.

// ---- The list: records near the window are drawn, the others hold their place ----

const list = byId("list");
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const record = records[target.dataset.index];
      if (!isIntersecting) forget(record);
      else if (!state.drawn.has(record)) draw(record);
    }
  },
  { rootMargin: "1200px 0px" },
);

function placeRecords() {
  const width = Math.max(20, list.clientWidth / 9); // letters in a line, about
  for (const [index, record] of records.entries()) {
    record.article = make("article", "");
    record.article.tabIndex = -1;
    record.article.dataset.index = index;
    record.article.setAttribute("aria-label", `record ${record.number}`);
    const numLetters = (isPair ? 2 : 1.4) * record.outputs[0].length; // a response stands beside something else
    record.article.style.minHeight = `${170 + 27 * Math.ceil(numLetters / width)}px`;
    watcher.observe(record.article);
  }
}

function listRecords() {
  const query = byId("query").value.trim().toLowerCase();
  const fits = FILTERS[byId("filter").value];
  state.listed = records.filter((record) => fits(record) && hasText(record, query));
  const rate = ORDERS[byId("order").value];
  if (rate) {
    const rates = new Map(state.listed.map((record) => [record, rate(record)]));
    state.listed.sort((one, other) => rates.get(other) - rates.get(one)); // stable: else in the file's order
  }
  list.replaceChildren(...state.listed.map((record) => record.article));
  byId("nothing").hidden = state.listed.length > 0;
  hideTip();
  showFigures();
  planCurves();
}

function showFigures() {
  const sums = sideNames.map((_, index) => sumUp(state.listed, index));
  const rows = sums.map((sum, index) => {
    const facts = [
      [count(sum.flagged, "token"), `flagged (${percent(sum.flagged, sum.tokens)})`],
      [sum.unflagged.toLocaleString("en"), "unsatisfactory without a flag"],
    ];
    if (sum.known) {
      facts.push(["precision", `${percent(sum.hits, sum.found)} (${sum.hits} of ${sum.found})`]);
      facts.push(["recall", `${percent(sum.hits, sum.wrong)} (${sum.hits} of ${sum.wrong})`]);
    }
    const shown = facts.map(([first, second]) => make("span", "", make("b", "", first), ` ${second}`));
    return make("p", "", ...(isPair ? [make("span", "side", sideNames[index])] : []), ...shown);
  });
  const flags = state.threshold === null ? "flags as in the file" : `flags by eq. 5 at \u03bb = ${state.threshold}`;
  const all = count(records.length, "record");
  const part = state.listed.length.toLocaleString("en");
  rows.push(make("p", "soft", `${state.listed.length < records.length ? `${part} of ${all}` : all}; ${flags}`));
  byId("figures").replaceChildren(...rows);
  byId("notes").textContent = describeLimits(sums).join(" ");
}

/** What the figures leave out, in sentences. */
function describeLimits(sums) {
  const notes = [];
  const numFixed = Math.max(...sums.map((sum) => sum.fixed));
  if (numFixed) {
    const flags = state.threshold === null ? "" : "; their flags stay as in the file";
    notes.push(`${count(numFixed, "unsatisfactory record")} without log-probs in both contexts${flags}.`);
  }
  const unsatisfactory = state.listed.filter((record) => !record.is_satisfactory).length;
  const numPraised = Math.max(...sums.map((sum) => sum.praised));
  if (numPraised) notes.push(`${count(numPraised, "flagged token")} of satisfactory records not counted.`);
  const numEdited = Math.max(...sums.map((sum) => sum.edited));
  if (numEdited) {
    notes.push(`${count(numEdited, "record")} with other flags in the file than eq. 5 gives at the file's threshold.`);
  }
  const numKnown = Math.max(...sums.map((sum) => sum.known));
  if (numKnown && numKnown < unsatisfactory) {
    notes.push(`Precision and recall are of the ${count(numKnown, "record")} with wrong_spans.`);
  }
  return notes;
}

// ---- Threshold ----

const readSlider = () => THRESHOLDS[byId("slider").value];
const placeSlider = (threshold) => (byId("slider").value = findStep(threshold));
const storedThresholds = [...new Set(data.made.map((made) => made.threshold))];

function setThreshold(threshold) {
  state.threshold = threshold;
  const shown = threshold ?? (storedThresholds.length === 1 ? storedThresholds[0] : null);
  if (document.activeElement !== byId("threshold")) byId("threshold").value = shown ?? ""; // nobody is typing there
  byId("threshold").placeholder = shown === null ? "several" : "";
  byId("slider").setAttribute("aria-valuetext", shown ?? "several");
  byId("stored").setAttribute("aria-pressed", String(threshold === null));
  state.drawn.forEach(markFlags);
  hideTip();
  showFigures();
  markThreshold();
}

/** Sorts again once the threshold rests: records that move under the pointer cannot be compared. */
function settleThreshold() {
  if (byId("order").value === "flagged" || byId("filter").value === "unflagged") listRecords();
}

/** The flags that the file holds: eq. 5 at its own threshold, and what was edited since. */
function restoreFlags() {
  placeSlider(storedThresholds[0]);
  setThreshold(null);
  settleThreshold();
}

function stepThreshold(steps) {
  byId("slider").value = Number(byId("slider").value) + steps;
  setThreshold(readSlider());
  settleThreshold();
}

// ---- Going about ----

const findTop = () => (getComputedStyle(byId("bar")).position === "sticky" ? byId("bar").offsetHeight : 0);

/** The record that was gone to, where it is in sight; else the first one that is. */
function findCurrent() {
  const isSeen = (record) => {
    const box = record.article.getBoundingClientRect();
    return record.article.isConnected && box.bottom > findTop() + 20 && box.top < innerHeight;
  };
  if (state.current && isSeen(state.current)) return state.current;
  return state.listed.find(isSeen) ?? null;
}

function goTo(record) {
  if (!record) return;
  if (!state.drawn.has(record)) draw(record);
  state.current = record;
  record.article.scrollIntoView({ block: "start" });
  record.article.focus({ preventScroll: true });
}

function step(steps) {
  const current = findCurrent();
  const isGoneTo = current !== null && current === state.current;
  const place = state.listed.indexOf(current);
  const wanted = isGoneTo ? place + steps : steps > 0 ? place : place - 1;
  goTo(state.listed[Math.max(0, Math.min(state.listed.length - 1, wanted))]);
}

/** The tokens of a record in the order in which they are gone through, and the one that has the focus. */
function findTokens(record) {
  const boxes = record.tokens.map(({ elements }) => elements);
  const focused = document.activeElement;
  const box = boxes.find((elements) => elements.includes(focused) || elements[0]?.parentNode === focused) ?? boxes[0];
  return { all: boxes.flat(), box: box ?? [], focused };
}

function stepToken(steps) {
  const record = records[document.activeElement.closest("article")?.dataset.index] ?? findCurrent();
  if (!record) return;
  if (!state.drawn.has(record)) draw(record);
  const { box, focused } = findTokens(record);
  const place = box.indexOf(focused);
  const wanted = place < 0 ? (steps > 0 ? 0 : box.length - 1) : place + steps;
  box[Math.max(0, Math.min(box.length - 1, wanted))]?.focus();
  state.current = record;
}

function stepFlag(steps) {
  let record = findCurrent();
  if (!record) return;
  if (!state.drawn.has(record)) draw(record);
  const { all, focused } = findTokens(record);
  const from = all.indexOf(focused);
  const rest = steps > 0 ? all.slice(from + 1) : all.slice(0, Math.max(0, from)).reverse();
  let found = rest.find((element) => element.classList.contains("flagged"));
  for (let place = state.listed.indexOf(record) + steps; !found && state.listed[place]; place += steps) {
    if (!hasFlag(state.listed[place])) continue;
    record = state.listed[place];
    goTo(record);
    const flagged = findTokens(record).all.filter((element) => element.classList.contains("flagged"));
    found = flagged.at(steps > 0 ? 0 : -1);
    break;
  }
  state.current = record;
  found?.focus();
}

function turn(select) {
  select.selectedIndex = (select.selectedIndex + 1) % select.length;
  listRecords();
}

// ---- Light and dark: the style's own rules for dark pages are switched on or off ----

const darkQuery = matchMedia("(prefers-color-scheme: dark)");
const darkRules = [...document.styleSheets[0].cssRules].filter((rule) => rule.conditionText === darkQuery.media);
let isDark = darkQuery.matches;

function setTheme(dark) {
  isDark = dark;
  for (const rule of darkRules) rule.media.mediaText = isDark ? "all" : "not all";
  document.documentElement.style.colorScheme = isDark ? "dark" : "light";
  byId("theme").textContent = isDark ? "light" : "dark";
}

// ---- Events ----

const ACTIONS = {
  j: () => step(1),
  k: () => step(-1),
  g: () => goTo(state.listed[0]),
  G: () => goTo(state.listed.at(-1)),
  ArrowRight: () => stepToken(1),
  ArrowLeft: () => stepToken(-1),
  n: () => stepFlag(1),
  p: () => stepFlag(-1),
  "/": () => byId("query").select(),
  f: () => turn(byId("filter")),
  o: () => turn(byId("order")),
  "[": () => stepThreshold(-4),
  "]": () => stepThreshold(4),
  0: restoreFlags,
  t: () => setTheme(!isDark),
  "?": () => byId("keys").showModal(),
  Escape: hideTip,
};

function listen() {
  document.addEventListener("keydown", (event) => {
    const { target, key } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
    if (target === byId("query") && key === "Escape") {
      if (!target.value) target.blur();
      target.value = "";
      listRecords();
      event.preventDefault();
    }
    const isOwn = target.matches("select, input:not([type=range])") || (target.matches("input") && key.length > 1);
    if (isOwn || !Object.hasOwn(ACTIONS, key)) return;
    event.preventDefault();
    ACTIONS[key]();
  });
  byId("query").addEventListener("input", listRecords);
  byId("filter").addEventListener("change", listRecords);
  byId("order").addEventListener("change", listRecords);
  byId("slider").addEventListener("input", () => setThreshold(readSlider()));
  byId("slider").addEventListener("change", settleThreshold);
  byId("threshold").addEventListener("input", (event) => {
    const threshold = event.target.valueAsNumber;
    if (!(threshold >= Number(byId("threshold").min))) return; // half written, or below eq. 5's; the field says so
    placeSlider(threshold);
    setThreshold(threshold);
  });
  byId("threshold").addEventListener("change", settleThreshold);
  byId("stored").addEventListener("click", restoreFlags);
  byId("curves").addEventListener("click", (event) => {
    setThreshold(THRESHOLDS[findPressed(event)]);
    placeSlider(state.threshold);
    settleThreshold();
  });
  byId("theme").addEventListener("click", () => setTheme(!isDark));
  byId("help").addEventListener("click", () => byId("keys").showModal());
  byId("keys").addEventListener("click", (event) => event.target === byId("keys") && byId("keys").close());
  darkQuery.addEventListener("change", (event) => setTheme(event.matches));
  const findToken = (event) => event.target.closest?.("article .t");
  for (const kind of ["pointerover", "focusin", "click"]) {
    list.addEventListener(kind, (event) => {
      const token = findToken(event);
      if (token) showTip(token);
      else if (kind !== "focusin") hideTip();
    });
  }
  list.addEventListener("focusin", (event) => (state.current = records[event.target.closest("article").dataset.index]));
  list.addEventListener("pointerleave", hideTip);
  list.addEventListener("focusout", hideTip);
  addEventListener("scroll", followToken, { passive: true });
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar-height", `${findTop()}px`);
  }).observe(byId("bar"));
}

// ---- The start ----

function start() {
  const numSatisfactory = records.filter((record) => record.is_satisfactory).length;
  const lead = [
    `${count(records.length, "record")}: ${numSatisfactory.toLocaleString("en")} satisfactory,`,
    `${(records.length - numSatisfactory).toLocaleString("en")} unsatisfactory.`,
  ];
  if (isPair) {
    const [first, second] = data.unpaired.map((number) => number.toLocaleString("en"));
    const isWhole = data.unpaired.every((number) => number === 0);
    const alone = `In one file alone, and not shown: ${first} before, ${second} after.`;
    lead.push(isWhole ? "All are in both files." : alone);
    byId("order").append(new Option("most changed by training first", "training"));
    byId("training-legend").hidden = byId("thin").hidden = false;
  }
  const names = data.names.map((name) => make("bdi", "", name));
  byId("lead").append(...(isPair ? ["before: ", names[0], ", after: ", names[1]] : names), ` \u00b7 ${lead.join(" ")}`);
  if (innerWidth < 700) for (const part of document.querySelectorAll(".legend")) part.open = false;
  drawScale();
  drawMade();
  placeRecords();
  listen();
  setTheme(isDark);
  byId("slider").max = THRESHOLDS.length - 1;
  byId("threshold").min = Math.min(1, ...storedThresholds); // what a file was made with is none to complain of
  listRecords();
  restoreFlags();
}

start();
