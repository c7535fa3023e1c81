// The studio: the list of responses, the way through it, and everything a person can do.

import { Saver, TAB, request } from "./api.js";
import { showSummary, showTraining, showPlan } from "./reports.js";
import { Review, announce } from "./review.js";
import { byId, count, make, makeText } from "./text.js";
import { drawScale } from "./tokens.js";

const STATES = {
  open: ["\u25cb", "open"],
  satisfactory: ["\u2713", "satisfactory"],
  unsatisfactory: ["\u2717", "unsatisfactory"],
  skipped: ["\u2013", "skipped"],
};
const SEARCH_PAUSE = 150;

const session = await request("/api/session");
const items = session.items.map(([title, state, hasDraft, key], index) => ({ index, title, state, hasDraft, key }));
let listed = items;
let found = null; // the indices that match the search; null without one
const conflicts = new Map(); // by item: { theirs, mine }

const review = new Review(session.models.length > 0, session.threshold, {
  onChange: (index, verdict) => {
    const conflict = conflicts.get(index);
    if (conflict) conflict.mine = verdict;
    saver.save(index, verdict);
    setState(index, verdict.state);
  },
  reconcile: (index, verdict) => saver.reconcile(index, verdict),
});
const saver = new Saver(`cutlm studio ${JSON.stringify([session.out, session.reviewer])}`, items.map(({ key }) => key), {
  onState: (kind, text) => {
    byId("saved").className = kind;
    byId("saved").textContent = text;
  },
  onSaved: (index, verdict, pace) => {
    setState(index, verdict.state);
    showPace(pace);
  },
  onConflict: (index, theirs, mine) => {
    if (mine && isSameVerdict(mine, theirs)) return;
    conflicts.set(index, { theirs, mine });
    if (index === review.index) showConflict();
    else announce(`another tab has changed response ${index + 1}`);
  },
});

const FIELDS = ["state", "judgment", "wrong_spans", "unflagged_spans", "i_ans"];
const isSameVerdict = (one, other) => FIELDS.every((name) => JSON.stringify(one[name]) === JSON.stringify(other[name]));

function showConflict() {
  const { index } = review;
  const conflict = conflicts.get(index);
  const settle = (verdict) => {
    conflicts.delete(index);
    review.setVerdict(verdict);
    review.showDraft();
    setState(index, verdict.state);
    saver.save(index, verdict); // also theirs, because what was written meanwhile is saved
    review.scoreAgain();
  };
  review.showConflict(conflict.theirs, () => settle(conflict.theirs), () => settle(conflict.mine));
}

// ---- The list ----

function drawRow(item) {
  const row = make("li", "");
  row.id = `item-${item.index}`;
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", "false");
  const title = makeText("span", "", item.title);
  title.dir = "auto";
  row.append(make("span", "number", String(item.index + 1)), make("span", "state"), title);
  item.row = row;
  showState(item);
  return row;
}

function showState(item) {
  const [sign, name] = STATES[item.state];
  const isDraft = item.hasDraft && item.state === "open";
  const cell = item.row.children[1];
  cell.replaceChildren(isDraft ? "\u270e" : sign, make("span", "unseen", isDraft ? "open, with a draft" : name));
  cell.className = `state ${item.state === "satisfactory" ? "good" : item.state === "unsatisfactory" ? "bad" : ""}`;
}

function setState(index, state) {
  items[index].state = state;
  showState(items[index]);
}

function fits(item) {
  const filter = byId("filter").value;
  const isShown = filter === "all" || (filter === "draft" ? item.state === "open" && item.hasDraft : item.state === filter);
  return isShown && (found === null || found.has(item.index));
}

function listItems() {
  listed = items.filter(fits);
  const rows = document.createDocumentFragment();
  for (const item of listed) rows.append(item.row);
  byId("list").replaceChildren(rows);
  byId("found").textContent = listed.length === items.length ? count(items.length, "response") : `${listed.length.toLocaleString("en")} of ${count(items.length, "response")}`;
  showCurrent();
}

function showCurrent() {
  for (const row of byId("list").querySelectorAll("[aria-selected=true]")) row.setAttribute("aria-selected", "false");
  const item = items[review.index];
  if (!item) return;
  item.row.setAttribute("aria-selected", "true");
  byId("list").setAttribute("aria-activedescendant", item.row.id);
  // Only the list scrolls, not the page.
  const list = byId("list");
  const top = item.row.offsetTop - list.offsetTop;
  if (top < list.scrollTop || top + item.row.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = top - list.clientHeight / 3;
  }
}

let searching = 0;
async function search() {
  const query = byId("query").value.trim();
  const number = ++searching;
  const indices = query ? await request(`/api/search?q=${encodeURIComponent(query)}`) : null;
  if (number !== searching) return; // a later search overtook it
  found = indices && new Set(indices);
  listItems();
}

function showPace({ num_decided, num_left, per_minute }) {
  byId("progress").max = num_decided + num_left;
  byId("progress").value = num_decided;
  let text = `${num_decided.toLocaleString("en")} of ${(num_decided + num_left).toLocaleString("en")} judged`;
  if (per_minute) {
    const minutes = Math.ceil(num_left / per_minute);
    const left = minutes > 90 ? count(Math.round(minutes / 60), "hour") : count(minutes, "minute");
    text += ` \u00b7 ${per_minute.toFixed(1)} a minute` + (num_left ? `, about ${left} left` : "");
  }
  byId("pace").textContent = text;
}

// ---- The way through the list ----

let opening = null; // the response that is being opened; until then, no key changes the verdict on the one before

function setOpening(index) {
  opening = index;
  for (const id of ["judgment", "improvement"]) byId(id).readOnly = index !== null;
}

async function open(index, { focus = null } = {}) {
  if (review.item && review.index !== index) leave();
  setOpening(index);
  try {
    await review.open(index);
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("saved").textContent = `response ${index + 1} cannot be read: ${error.message}`;
    setOpening(null);
    return;
  }
  setOpening(null);
  const { item } = review;
  items[index].hasDraft = item.draft !== null;
  byId("position").textContent = `Response ${index + 1} of ${items.length} \u00b7 ${item.location}`;
  if (conflicts.has(index)) {
    review.setVerdict(conflicts.get(index).mine);
    showConflict();
  }
  showCurrent();
  if (focus) byId(focus).focus({ preventScroll: true });
}

/** Decides by what was written, before another response is shown. */
function leave() {
  if (!conflicts.has(review.index) && review.verdict.state === "open") review.decide();
}

function step(steps) {
  const place = listed.findIndex(({ index }) => index === review.index);
  const next = place < 0 ? listed.find(({ index }) => index > review.index) ?? listed[0] : listed[place + steps];
  if (next) open(next.index);
  else announce(steps > 0 ? "this is the last response" : "this is the first response");
}

/** Goes to the next open response after this one, from the start once there is none. */
function openNext(options) {
  const later = items.filter((item) => item.index !== review.index && item.state === "open" && (found === null || found.has(item.index)));
  const next = later.find(({ index }) => index > review.index) ?? later[0];
  if (next) open(next.index, options);
  else {
    leave();
    announce("no open response is left");
    byId("saved").textContent = "no open response is left";
  }
}

function finish() {
  if (opening !== null) return;
  const isWriting = document.activeElement === byId("judgment");
  if (review.decide()) openNext({ focus: isWriting ? "judgment" : null });
  else {
    const hasMarks = review.verdict.wrong_spans.length > 0;
    review.showNotice(`Write what is wrong${hasMarks ? " with the marked passages" : ""}, or press s outside the box if the response is satisfactory.`);
    byId("judgment").focus();
  }
}

function decide(state) {
  if (opening !== null) return;
  review.change({ state });
  openNext();
}

function accept() {
  if (opening === null && review.acceptDraft()) openNext();
}

// ---- Views, light and dark ----

const VIEWS = ["judge", "summary", "train"];

function showView(name) {
  for (const view of VIEWS) byId(view).hidden = view !== name;
  for (const button of document.querySelectorAll("nav button")) {
    if (button.dataset.view === name) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  review.hideTip();
  if (name !== "judge") leave();
  if (name === "summary") showSummary((index) => { showView("judge"); open(index); });
  if (name === "train") {
    showPlan(review.threshold);
    showTraining();
  }
}

const darkQuery = matchMedia("(prefers-color-scheme: dark)");
const getTheme = () => localStorage.getItem("cutlm studio theme") ?? (darkQuery.matches ? "dark" : "light");

function showTheme() {
  document.documentElement.style.colorScheme = getTheme();
  byId("theme").textContent = getTheme() === "dark" ? "light" : "dark";
}

function switchTheme() {
  localStorage.setItem("cutlm studio theme", getTheme() === "dark" ? "light" : "dark");
  showTheme();
}

// ---- Events ----

const JUDGE_KEYS = {
  s: () => decide("satisfactory"),
  x: () => decide("skipped"),
  w: () => byId("judgment").focus(),
  a: accept,
  e: () => review.editDraft(),
  j: () => step(1),
  k: () => step(-1),
  u: () => openNext(),
  r: () => review.enterResponse(),
  m: () => review.mark(),
  Delete: () => review.unmark(),
  i: () => {
    byId("improved").open = true;
    byId("improvement").focus();
  },
  "[": () => review.stepThreshold(-4),
  "]": () => review.stepThreshold(4),
  "/": () => {
    byId("responses").open = true;
    byId("query").select();
  },
  f: () => {
    byId("filter").selectedIndex = (byId("filter").selectedIndex + 1) % byId("filter").length;
    listItems();
    announce(`${byId("filter").selectedOptions[0].text}: ${count(listed.length, "response")}`);
  },
  Escape: () => review.hideTip(),
};
const KEYS = {
  1: () => showView("judge"),
  2: () => showView("summary"),
  3: () => showView("train"),
  t: switchTheme,
  "?": () => byId("keys").showModal(),
};

function handleKey(event) {
  const { target, key } = event;
  if (event.isComposing || byId("keys").open) return;
  const isText = target.matches("textarea, input[type=search]");
  const isJudging = !byId("judge").hidden;
  if ((event.ctrlKey || event.metaKey) && key === "Enter" && isJudging) {
    event.preventDefault();
    finish();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (isText) {
    if (key !== "Escape") return;
    if (target === byId("query") && target.value) {
      target.value = "";
      search();
    } else target.blur();
    event.preventDefault();
    return;
  }
  if (isJudging && review.handleKey(event)) {
    event.preventDefault();
    return;
  }
  if (target === byId("list") && ["ArrowDown", "ArrowUp"].includes(key)) {
    event.preventDefault();
    step(key === "ArrowDown" ? 1 : -1);
    return;
  }
  const isOwn = target.matches("select") || (target.matches("input") && key.length > 1);
  const action = KEYS[key] ?? (isJudging ? JUDGE_KEYS[key] : undefined);
  if (isOwn || !action) return;
  event.preventDefault();
  action();
}

function listen() {
  document.addEventListener("keydown", handleKey);
  let timer = 0;
  byId("query").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, SEARCH_PAUSE);
  });
  byId("filter").addEventListener("change", listItems);
  byId("list").addEventListener("click", (event) => {
    const row = event.target.closest("li");
    if (row) open(Number(row.id.slice("item-".length)));
  });
  const actions = {
    done: finish, satisfactory: () => decide("satisfactory"), skip: () => decide("skipped"), previous: () => step(-1),
    next: () => step(1), open: () => openNext(), accept, "edit-draft": () => review.editDraft(), theme: switchTheme,
    help: () => byId("keys").showModal(),
  };
  for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  byId("keys").addEventListener("click", (event) => event.target === byId("keys") && byId("keys").close());
  for (const button of document.querySelectorAll("nav button")) {
    button.addEventListener("click", () => showView(button.dataset.view));
  }
  darkQuery.addEventListener("change", showTheme);
}

/** What other tabs saved, drafts, and the training run. */
function watch() {
  const events = new EventSource("/api/events");
  events.addEventListener("saved", async (event) => {
    const { index, state, tab } = JSON.parse(event.data);
    if (tab === TAB) return;
    setState(index, state);
    if (saver.isSaving(index) || conflicts.has(index)) return; // the server refuses it, and the person chooses
    if (index !== review.index) return;
    const { verdict } = await request(`/api/items/${index}`);
    if (index !== review.index || saver.isSaving(index)) return;
    review.setVerdict(saver.reconcile(index, verdict));
    review.scoreAgain();
  });
  events.addEventListener("draft", async (event) => {
    const index = JSON.parse(event.data);
    if (index === null) {
      const { judge } = await request("/api/session");
      if (judge?.problem) announceProblem(`no more drafts: ${judge.problem}`);
      return;
    }
    items[index].hasDraft = true;
    showState(items[index]);
    if (index !== review.index) return;
    review.item.draft = (await request(`/api/items/${index}`)).draft;
    if (index === review.index) review.showDraft();
  });
  let known = String(session.models.length); // the number of models, and the one that the last run has trained
  events.addEventListener("training", async () => {
    const { models, comparison, run } = await showTraining();
    const loaded = [models.length, ...(comparison ? [run.folder] : [])].join(" ");
    if (loaded !== known) {
      known = loaded;
      review.scoreAgain();
    }
  });
}

function announceProblem(text) {
  byId("saved").className = "bad";
  byId("saved").textContent = text;
}

// ---- Start ----

document.title = `cutlm studio: ${session.reviewer}`;
byId("scale").append(...drawScale());
if (innerWidth < 832) byId("responses").open = false;
items.forEach(drawRow);
listen();
showTheme();
showPace(session.pace);
listItems();
saver.restore();
if (session.judge?.problem) announceProblem(`no drafts: ${session.judge.problem}`);
await open((items.find(({ state }) => state === "open") ?? items[0]).index);
watch();
document.documentElement.dataset.ready = "true";
