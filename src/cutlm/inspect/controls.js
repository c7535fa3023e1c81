// Part 3: the list of records, the counts above it, and everything a user can do.

// ---- List: only records near the window are drawn ----

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
  const width = Math.max(20, list.clientWidth / 9); // approximate characters per line
  for (const [index, record] of records.entries()) {
    record.article = make("article", "");
    record.article.tabIndex = -1;
    record.article.dataset.index = index;
    record.article.setAttribute("aria-label", `record ${record.number}`);
    const numLetters = (isPair ? 2 : 1.4) * record.outputs[0].length;
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
    state.listed.sort((one, other) => rates.get(other) - rates.get(one)); // stable: ties stay in file order
  }
  list.replaceChildren(...state.listed.map((record) => record.article));
  byId("nothing").hidden = state.listed.length > 0;
  hideTip();
  showFigures();
  scheduleCurves();
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
  const flags = state.threshold === null ? "flags from file" : `flags by eq. 5 at \u03bb = ${state.threshold}`;
  const all = count(records.length, "record");
  const part = state.listed.length.toLocaleString("en");
  rows.push(make("p", "soft", `${state.listed.length < records.length ? `${part} of ${all}` : all}; ${flags}`));
  byId("figures").replaceChildren(...rows);
  byId("notes").textContent = describeLimits(sums).join(" ");
}

/** Sentences about what the counts leave out. */
function describeLimits(sums) {
  const notes = [];
  const findMost = (name) => Math.max(...sums.map((sum) => sum[name]));
  if (findMost("withoutLogps")) {
    const flags = state.threshold === null ? "" : "; the threshold does not change their flags";
    notes.push(`${count(findMost("withoutLogps"), "unsatisfactory record")} without log-probs in both contexts${flags}.`);
  }
  if (findMost("satisfactoryFlags")) {
    notes.push(`${count(findMost("satisfactoryFlags"), "flagged token")} of satisfactory records not counted.`);
  }
  if (findMost("edited")) {
    notes.push(`${count(findMost("edited"), "record")} with stored flags that differ from eq. 5 at the stored threshold.`);
  }
  const numKnown = findMost("known");
  if (numKnown && numKnown < state.listed.filter((record) => !record.is_satisfactory).length) {
    notes.push(`Precision and recall cover the ${count(numKnown, "record")} with wrong_spans.`);
  }
  return notes;
}

// ---- Threshold ----

const readSlider = () => THRESHOLDS[byId("slider").value];
const setSlider = (threshold) => (byId("slider").value = findStep(threshold));
const storedThresholds = [...new Set(data.settings.map((settings) => settings.threshold))];

function setThreshold(threshold) {
  state.threshold = threshold;
  const shown = threshold ?? (storedThresholds.length === 1 ? storedThresholds[0] : null);
  if (document.activeElement !== byId("threshold")) byId("threshold").value = shown ?? ""; // do not overwrite what is being typed
  byId("threshold").placeholder = shown === null ? "several" : "";
  byId("slider").setAttribute("aria-valuetext", shown ?? "several");
  byId("stored").setAttribute("aria-pressed", String(threshold === null));
  state.drawn.forEach(markFlags);
  hideTip();
  showFigures();
  moveMarker();
}

/** Sorts again when the slider is released, so that records do not move while it is dragged. */
function settleThreshold() {
  if (byId("order").value === "flagged" || byId("filter").value === "unflagged") listRecords();
}

function restoreFlags() {
  setSlider(storedThresholds[0]);
  setThreshold(null);
  settleThreshold();
}

function stepThreshold(steps) {
  byId("slider").value = Number(byId("slider").value) + steps;
  setThreshold(readSlider());
  settleThreshold();
}

// ---- Navigation ----

const findTop = () => (getComputedStyle(byId("bar")).position === "sticky" ? byId("bar").offsetHeight : 0);

/** The last visited record if it is visible, else the first visible one. */
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
  const isVisited = current !== null && current === state.current;
  const index = state.listed.indexOf(current);
  const wanted = isVisited ? index + steps : steps > 0 ? index : index - 1;
  goTo(state.listed[Math.max(0, Math.min(state.listed.length - 1, wanted))]);
}

/** All tokens of a record in order, those of the focused response (`box`), and the focused element. */
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
  const index = box.indexOf(focused);
  const wanted = index < 0 ? (steps > 0 ? 0 : box.length - 1) : index + steps;
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
  for (let index = state.listed.indexOf(record) + steps; !found && state.listed[index]; index += steps) {
    if (!hasFlag(state.listed[index])) continue;
    record = state.listed[index];
    goTo(record);
    const flagged = findTokens(record).all.filter((element) => element.classList.contains("flagged"));
    found = flagged.at(steps > 0 ? 0 : -1);
    break;
  }
  state.current = record;
  found?.focus();
}

function cycle(select) {
  select.selectedIndex = (select.selectedIndex + 1) % select.length;
  listRecords();
}

// ---- Light and dark ----

const darkQuery = matchMedia("(prefers-color-scheme: dark)");
let isDark = darkQuery.matches;

function setTheme(dark) {
  isDark = dark;
  document.documentElement.style.colorScheme = isDark ? "dark" : "light";
  byId("theme").textContent = isDark ? "light" : "dark";
  for (const image of document.images) image.src = isDark ? image.dataset.dark : image.dataset.light;
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
  f: () => cycle(byId("filter")),
  o: () => cycle(byId("order")),
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
    if (!(threshold >= Number(byId("threshold").min))) return; // incomplete or too small; the field shows it
    setSlider(threshold);
    setThreshold(threshold);
  });
  byId("threshold").addEventListener("change", settleThreshold);
  byId("stored").addEventListener("click", restoreFlags);
  byId("curves").addEventListener("click", (event) => {
    setThreshold(THRESHOLDS[findClicked(event)]);
    setSlider(state.threshold);
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

// ---- Start ----

function describeFiles() {
  const names = data.names.map((name) => make("bdi", "", name));
  const numSatisfactory = records.filter((record) => record.is_satisfactory).length;
  const numOthers = records.length - numSatisfactory;
  const [satisfactory, unsatisfactory] = [numSatisfactory, numOthers].map((number) => number.toLocaleString("en"));
  const counts = `${count(records.length, "record")}: ${satisfactory} satisfactory, ${unsatisfactory} unsatisfactory`;
  let unpaired = "";
  if (data.unpaired.some(Boolean)) {
    const [first, second] = data.unpaired.map((number) => number.toLocaleString("en"));
    unpaired = ` \u00b7 not shown, because only one file has them: ${first} before, ${second} after`;
  }
  const files = isPair ? ["before: ", names[0], ", after: ", names[1], " \u00b7 "] : [...names, names.length ? " \u00b7 " : ""];
  byId("counts").append(...files, counts, unpaired);
}

function start() {
  appendText(document.querySelector("h1"), data.title);
  byId("lead").append(...data.lead.map((text) => makeText("p", "", text)));
  byId("sections").append(...data.sections.map(drawSection));
  data.sensitivities.forEach((known, index) => known && byId("sensitivity").append(drawSensitivity(known, sideNames[index])));
  const noise = data.sensitivities.findLast((known) => known?.noise)?.noise;
  if (noise) byId("sensitivity").append(makeText("p", "bad", `\u26a0 ${noise}.`));
  listen();
  setTheme(isDark);
  byId("tokens").hidden = records.length === 0;
  if (!records.length) return;
  if (isPair) {
    byId("order").append(new Option("most changed by training first", "training"));
    byId("training-legend").hidden = byId("thin").hidden = false;
  }
  byId("wrong-legend").hidden = !records.some((record) => record.sides[0].wrong);
  byId("filter").append(...groups.map((group) => new Option(group, `group ${group}`)));
  if (innerWidth < 700) for (const part of document.querySelectorAll(".legend")) part.open = false;
  describeFiles();
  byId("scale").append(...drawScale());
  drawSettings();
  placeRecords();
  byId("slider").max = THRESHOLDS.length - 1;
  byId("threshold").min = Math.min(1, ...storedThresholds); // a file's own threshold is always valid
  listRecords();
  restoreFlags();
}

start();
