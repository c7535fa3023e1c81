// One response: its text, marks and flags, the judgment, and what the models say about it.

import { Refusal, TAB, request } from "./api.js";
import { drawDiff } from "./diff.js";
import { addSpan, covers, findSelected, locatePieces, removeSpans } from "./marks.js";
import { appendText, byId, count, make, makeTable, makeText, percent, showChange, showLogp } from "./text.js";
import { THRESHOLDS, countTokens, drawGauge, drawPieces, findLargest, findStep, listIndices, placeTip, shade, showFactor, subtract } from "./tokens.js";

const TYPING_PAUSE = 120; // milliseconds without a key after which a judgment is scored
const EMPTY = { state: "open", judgment: "", wrong_spans: [], unflagged_spans: [], i_ans: null };
const ROLES = { system: "System", developer: "System", user: "User", assistant: "Assistant", tool: "Tool" };

/** Shows a text to screen readers. */
export function announce(text) {
  byId("live").textContent = text;
}

export class Review {
  item = null; // as the server describes it
  verdict = EMPTY; // with all changes
  views = []; // a box for each model, or one without a model
  threshold = 1.1;
  #opening = null;
  #scoring = null;
  #reacting = null;
  #timer = 0;
  #anchor = null; // the first and the last piece of the selection, in the view `#focused`
  #caret = null;
  #focused = 0;
  #pointed = null;
  #judgmentOfScores = null;

  /**
   * `hasModel`: whether responses are scored. `handlers`: onChange(index, verdict), called after each change, and
   * reconcile(index, verdict), which returns the newest verdict.
   */
  constructor(hasModel, threshold, handlers) {
    Object.assign(this, { hasModel, threshold, handlers });
    byId("model").hidden = byId("legend").hidden = !hasModel;
    byId("slider").max = THRESHOLDS.length - 1;
    this.setThreshold(threshold);
    this.#listen();
  }

  get index() {
    return this.item?.index ?? null;
  }

  // ---- Opening ----

  /** Shows a response. Returns whether it is still the one to show once it has arrived. */
  async open(index) {
    this.#opening?.abort();
    this.#opening = new AbortController();
    const item = await request(`/api/items/${index}`, { signal: this.#opening.signal });
    this.item = item;
    this.#stopScoring();
    this.setVerdict(this.handlers.reconcile(index, item.verdict));
    this.#judgmentOfScores = null;
    this.#anchor = this.#caret = null;
    byId("scoring").textContent = "";
    byId("reaction").replaceChildren();
    this.hideNotice();
    byId("conversation").replaceChildren(...item.messages.map((message, place) => {
      const turn = make("div", place === item.messages.length - 1 ? "turn last" : "turn");
      turn.dir = "auto";
      turn.tabIndex = 0;
      if (item.messages.length > 1) turn.append(make("b", "", ROLES[message.role] ?? message.role));
      return appendText(turn, message.text);
    }));
    if (item.tools.length) {
      const tools = make("details", "", make("summary", "", count(item.tools.length, "tool")));
      tools.append(...item.tools.map((tool) => makeText("pre", "", tool)));
      byId("conversation").prepend(tools);
    }
    countTokens(item.words);
    this.#drawViews([{ ...item.words, name: "", ratios: null }]);
    this.showDraft();
    byId("improved").open = this.verdict.i_ans !== null;
    scrollTo(0, 0);
    this.#score();
  }

  /** Shows a draft that has arrived, or hides it once there is a verdict. */
  showDraft() {
    const { draft } = this.item;
    byId("draft").hidden = !draft || this.verdict.state !== "open" || Boolean(this.verdict.judgment.trim());
    if (!draft) return;
    byId("draft-source").textContent = draft.source;
    byId("draft-text").replaceChildren();
    appendText(byId("draft-text"), draft.judgment ?? "satisfactory");
  }

  setVerdict(verdict) {
    this.verdict = { ...EMPTY, ...verdict };
    if (byId("judgment").value !== this.verdict.judgment) byId("judgment").value = this.verdict.judgment;
    this.#showImprovement();
    this.#showMarks();
  }

  // ---- Changes ----

  change(changes) {
    this.verdict = { ...this.verdict, ...changes };
    this.handlers.onChange(this.index, this.verdict);
  }

  /** Decides by what was written; returns whether there is a decision. */
  decide() {
    const { state, judgment } = this.verdict;
    if (!judgment.trim()) return state !== "open";
    if (state !== "unsatisfactory") this.change({ state: "unsatisfactory" });
    return true;
  }

  acceptDraft() {
    const { draft } = this.item;
    if (!draft || byId("draft").hidden) return false;
    const state = draft.judgment === null || /^\s*perfect\b/i.test(draft.judgment) ? "satisfactory" : "unsatisfactory";
    this.change({ state, judgment: draft.judgment ?? "", wrong_spans: draft.wrong_spans, i_ans: draft.i_ans });
    return true;
  }

  editDraft() {
    const { draft } = this.item;
    if (!draft || byId("draft").hidden) return;
    this.change({ judgment: draft.judgment ?? "", wrong_spans: draft.wrong_spans, i_ans: draft.i_ans });
    this.setVerdict(this.verdict);
    this.showDraft();
    byId("judgment").focus();
    this.#score();
  }

  #writeJudgment(judgment) {
    // What was decided is open again while it is written.
    this.change({ judgment, state: "open" });
    this.showDraft();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#score(), TYPING_PAUSE);
  }

  // ---- Improved response ----

  #showImprovement() {
    const { i_ans } = this.verdict;
    const text = i_ans ?? this.item.output;
    if (byId("improvement").value !== text) byId("improvement").value = text;
    byId("drop").disabled = i_ans === null;
    byId("diff").replaceChildren(...(i_ans === null ? [] : drawDiff(this.item.output, i_ans)));
  }

  #writeImprovement(text) {
    // Text boxes turn other line ends into "\n".
    const isSame = text === this.item.output.replace(/\r\n?/g, "\n") || !text.trim();
    this.change({ i_ans: isSame ? null : text });
    byId("drop").disabled = isSame;
    byId("diff").replaceChildren(...(isSame ? [] : drawDiff(this.item.output, text)));
  }

  // ---- Models ----

  #stopScoring() {
    clearTimeout(this.#timer);
    this.#scoring?.abort();
    this.#reacting?.abort();
  }

  /** Has the response scored with the judgment; an earlier request is cancelled. */
  async #score() {
    this.#stopScoring();
    if (!this.hasModel) return;
    const { index } = this.item;
    const { judgment } = this.verdict;
    if (judgment === this.#judgmentOfScores) return;
    this.#scoring = new AbortController();
    const { signal } = this.#scoring;
    byId("scoring").textContent = "scoring \u2026";
    try {
      const { sides } = await request("/api/score", { method: "POST", body: { index, judgment, tab: TAB }, signal });
      if (signal.aborted) return;
      this.#showSides(sides);
      this.#judgmentOfScores = judgment;
    } catch (error) {
      if (!signal.aborted && !isOvertaken(error)) byId("scoring").textContent = `not scored: ${error.message}`;
      return;
    }
    this.measureReaction();
  }

  /** Scores again, as after a model was trained. */
  scoreAgain() {
    this.#judgmentOfScores = null;
    if (this.item) this.#score();
  }

  #showSides(sides) {
    const usable = sides.filter((side) => !side.problem);
    byId("scoring").textContent = sides.filter((side) => side.problem)
      .map((side) => `${side.name ? `${side.name}: ` : ""}not scored: ${side.problem}`).join(" ");
    if (!usable.length) return;
    for (const side of usable) {
      side.ratios = side.with ? subtract(side.with, side.without) : null;
      countTokens(side);
    }
    const isSame = usable.length === this.views.length
      && usable.every((side, place) => isEqual(side.pieces, this.views[place].side.pieces) && isEqual(side.sizes, this.views[place].side.sizes));
    if (!isSame) this.#drawViews(usable);
    else {
      usable.forEach((side, place) => {
        const view = this.views[place];
        view.side = side;
        view.elements.forEach((element, piece) => shade(element, findLargest(side.ratios, side, piece)));
      });
      this.#showMarks();
    }
  }

  /** Measures whether the flags of this wording differ from those of other judgments. */
  async measureReaction() {
    this.#reacting?.abort();
    const { judgment } = this.verdict;
    if (!this.hasModel || !judgment.trim() || !this.views[0].side.ratios) {
      byId("reaction").replaceChildren();
      return;
    }
    this.#reacting = new AbortController();
    const { signal } = this.#reacting;
    const body = { index: this.index, judgment, threshold: this.threshold, tab: TAB };
    try {
      const found = await request("/api/reaction", { method: "POST", body, signal });
      if (!signal.aborted) this.#showReaction(found);
    } catch (error) {
      if (!signal.aborted && !isOvertaken(error)) byId("reaction").textContent = `reaction unknown: ${error.message}`;
    }
  }

  #showReaction({ reaction, num_foreign }) {
    if (!reaction) {
      const text = num_foreign ? "" : "Once you have judged another response, this line says whether the model reacts to the wording.";
      byId("reaction").replaceChildren(makeText("span", "soft", text));
      return;
    }
    const { flag_signal: signal, is_noise: isNoise, flagged_share_own: own, flagged_share_foreign: foreign } = reaction;
    const verdict = isNoise ? "The model does not react to this wording" : "The model reacts to this wording";
    const detail = `: it flags ${percent(own, 1)} of the tokens, and ${percent(foreign, 1)} under ${count(num_foreign, "judgment")} of other responses.`;
    const line = make("p", "", make("span", "", "Reaction "), ...drawGauge(signal, isNoise), " ");
    line.append(make("b", isNoise ? "bad" : "", `${isNoise ? "\u26a0 " : ""}${verdict}`), makeText("span", "soft", detail));
    byId("reaction").replaceChildren(line);
  }

  setThreshold(threshold) {
    this.threshold = threshold;
    byId("slider").value = findStep(threshold);
    byId("slider").setAttribute("aria-valuetext", String(threshold));
    byId("threshold").textContent = String(threshold);
    this.#showMarks();
  }

  stepThreshold(steps) {
    if (!this.hasModel) return;
    const step = Math.max(0, Math.min(THRESHOLDS.length - 1, findStep(this.threshold) + steps));
    this.setThreshold(THRESHOLDS[step]);
    this.measureReaction();
  }

  /** Eq. 5; what the chat template writes is never flagged. */
  #exceeds(side, piece) {
    return Boolean(side.ratios) && listIndices(side, piece)
      .some((index) => index >= side.num_template_tokens && side.ratios[index] > Math.log(this.threshold));
  }

  // ---- Tokens ----

  #drawViews(sides) {
    this.hideTip();
    const hadFocus = byId("sides").contains(document.activeElement);
    this.views = sides.map((side) => {
      const label = `${side.name ? `response, scored ${side.name} training` : "response"}; arrow keys move, with Shift they select`;
      const { box, elements } = drawPieces(side, this.item.output, side.ratios, label);
      return { side, box, elements, spans: locatePieces(side) };
    });
    byId("sides").replaceChildren(...this.views.flatMap(({ side, box }) =>
      side.name ? [make("p", "side-name", `${side.name} training`), box] : [box]));
    this.#anchor = this.#caret = null;
    this.#focused = 0;
    if (hadFocus) this.views[0].box.focus({ preventScroll: true });
    this.#showMarks();
  }

  #showMarks() {
    if (!this.item) return;
    const { wrong_spans: wrong, unflagged_spans: unflagged } = this.verdict;
    let numFlagged = 0;
    this.views.forEach((view, place) => {
      view.elements.forEach((element, piece) => {
        const span = view.spans[piece];
        const exceeds = this.#exceeds(view.side, piece);
        const isUnflagged = exceeds && unflagged.some((other) => covers(other, span));
        element.classList.toggle("flagged", exceeds && !isUnflagged);
        element.classList.toggle("unflagged", isUnflagged);
        element.classList.toggle("wrong", wrong.some((other) => covers(other, span)));
        if (place === 0) numFlagged += exceeds && !isUnflagged;
      });
    });
    const side = this.views[0]?.side;
    byId("flags").textContent = side?.ratios
      ? `${numFlagged} of ${count(side.numTokens, "token")} flagged (${percent(numFlagged, side.numTokens)})` : "";
    this.#showChosen();
  }

  /** The chosen pieces of a view: [view, first, last]; null without any. */
  #findChosen() {
    if (this.#anchor === null) return null;
    const view = this.views[this.#focused];
    return [view, Math.min(this.#anchor, this.#caret), Math.max(this.#anchor, this.#caret)];
  }

  #showChosen() {
    const chosen = this.#findChosen();
    for (const view of this.views) {
      view.elements.forEach((element, piece) => {
        element.classList.toggle("chosen", chosen !== null && view === chosen[0] && piece >= chosen[1] && piece <= chosen[2]);
      });
    }
    const passage = this.#findPassage();
    byId("mark").disabled = passage === null;
    byId("unmark").disabled = passage === null || !this.verdict.wrong_spans.some((span) => covers(span, passage) || covers(passage, span));
  }

  #findPassage() {
    const chosen = this.#findChosen();
    if (chosen === null) return null;
    const [view, first, last] = chosen;
    const [start, end] = [view.spans[first][0], view.spans[last][1]];
    return [start, Math.max(start, end)];
  }

  #choose(place, anchor, caret) {
    [this.#focused, this.#anchor, this.#caret] = [place, anchor, caret];
    this.#showChosen();
  }

  mark() {
    const passage = this.#findPassage();
    if (passage === null) return;
    this.change({ wrong_spans: addSpan(this.verdict.wrong_spans, passage) });
    this.#endChoice("marked as wrong");
  }

  unmark() {
    const passage = this.#findPassage();
    if (passage === null) return;
    this.change({ wrong_spans: removeSpans(this.verdict.wrong_spans, passage) });
    this.#endChoice("mark removed");
  }

  #endChoice(what) {
    const passage = this.#findPassage();
    announce(`${what}: ${[...this.item.output].slice(...passage).join("") || "the end of the response"}`);
    getSelection().removeAllRanges();
    this.#anchor = this.#caret = null;
    this.#showMarks();
  }

  /** Removes the flag of a token, or puts it back. */
  toggleFlag(place, piece) {
    const view = this.views[place];
    if (!this.#exceeds(view.side, piece)) return;
    const span = view.spans[piece];
    const { unflagged_spans: unflagged } = this.verdict;
    const isUnflagged = unflagged.some((other) => covers(other, span));
    // Not joined as marks are, so that each can be put back alone.
    this.change({ unflagged_spans: isUnflagged ? removeSpans(unflagged, span) : [...unflagged, span] });
    this.#showMarks();
    announce(isUnflagged ? "flag put back" : "flag removed");
  }

  enterResponse() {
    this.views[0]?.box.focus();
    if (this.views[0]) this.#moveTo(0, this.#caret ?? 0, false);
  }

  #moveTo(place, piece, isSelecting) {
    const { elements } = this.views[place];
    const target = Math.max(0, Math.min(elements.length - 1, piece));
    // Only the focused token can be focused: dragging across others would not select their text.
    elements[target].tabIndex = -1;
    elements[target].focus();
    this.#choose(place, isSelecting && this.#anchor !== null ? this.#anchor : target, target);
  }

  /** Handles a key inside the response; returns whether it did. */
  handleKey(event) {
    const place = this.views.findIndex(({ box }) => box.contains(event.target));
    if (place < 0) return false;
    const view = this.views[place];
    const current = view.elements.indexOf(event.target);
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (steps !== undefined) {
      const from = current < 0 ? (steps > 0 ? -1 : view.elements.length) : current;
      const last = view.elements.length - 1;
      this.#moveTo(place, steps === Infinity ? last : steps === -Infinity ? 0 : from + steps, event.shiftKey);
    } else if (event.key === "Enter" || event.key === " ") {
      if (current >= 0) this.toggleFlag(place, current);
    } else if (event.key === "Delete" || event.key === "Backspace") this.unmark();
    else return false;
    return true;
  }

  // ---- Tooltip ----

  hideTip() {
    byId("tip").hidden = true;
    this.#pointed?.classList.remove("pointed");
    this.#pointed?.removeAttribute("aria-describedby");
    this.#pointed = null;
  }

  #showTip(element) {
    if (this.#pointed === element) return;
    this.hideTip();
    const view = this.views.find(({ box }) => box.contains(element));
    if (!view?.side.without) return;
    const { side } = view;
    this.#pointed = element;
    element.classList.add("pointed");
    element.setAttribute("aria-describedby", "tip");
    const piece = Number(element.dataset.piece);
    byId("tip").replaceChildren(...listIndices(side, piece).map((index) => {
      const rows = [["log p without", showLogp(side.without[index])]];
      if (side.ratios) {
        rows.push(["log p with", showLogp(side.with[index])], ["difference", showChange(side.ratios[index])]);
        rows.push(["times as likely", showFactor(side.ratios[index])]);
        const isUnflagged = element.classList.contains("unflagged");
        rows.push(["flagged", isUnflagged ? "no, you removed it" : element.classList.contains("flagged") ? "yes" : "no"]);
      }
      return makeTable("", null, rows);
    }));
    byId("tip").hidden = false;
    placeTip(byId("tip"), element.getClientRects()[0] ?? element.getBoundingClientRect());
  }

  // ---- Notices ----

  /** Shows that another tab saved something else, and lets the person choose. */
  showConflict(theirs, onTheirs, onMine) {
    const text = theirs.state === "satisfactory" ? "satisfactory" : theirs.judgment || theirs.state;
    const use = make("button", "", "Use that");
    const keep = make("button", "", "Keep mine");
    use.type = keep.type = "button";
    use.addEventListener("click", () => { this.hideNotice(); onTheirs(); });
    keep.addEventListener("click", () => { this.hideNotice(); onMine(); });
    byId("notice").replaceChildren(makeText("p", "", `Another tab has changed this verdict meanwhile: ${text}`), use, " ", keep);
    byId("notice").hidden = false;
  }

  showNotice(text) {
    byId("notice").replaceChildren(makeText("p", "", text));
    byId("notice").hidden = false;
  }

  hideNotice() {
    byId("notice").hidden = true;
    byId("notice").replaceChildren();
  }

  #listen() {
    byId("judgment").addEventListener("input", (event) => this.#writeJudgment(event.target.value));
    byId("improvement").addEventListener("input", (event) => this.#writeImprovement(event.target.value));
    byId("drop").addEventListener("click", () => {
      this.change({ i_ans: null });
      this.#showImprovement();
    });
    byId("slider").addEventListener("input", (event) => this.setThreshold(THRESHOLDS[event.target.value]));
    byId("slider").addEventListener("change", () => this.measureReaction());
    // A press must not end the selection before the click marks it.
    for (const id of ["mark", "unmark"]) byId(id).addEventListener("pointerdown", (event) => event.preventDefault());
    byId("mark").addEventListener("click", () => this.mark());
    byId("unmark").addEventListener("click", () => this.unmark());
    const sides = byId("sides");
    sides.addEventListener("pointerover", (event) => {
      const token = event.target.closest?.(".t");
      if (token) this.#showTip(token);
      else this.hideTip();
    });
    sides.addEventListener("focusin", (event) => event.target.matches(".t") && this.#showTip(event.target));
    sides.addEventListener("pointerleave", () => this.hideTip());
    sides.addEventListener("focusout", (event) => {
      this.hideTip();
      if (event.target.matches(".t")) event.target.removeAttribute("tabindex");
    });
    addEventListener("scroll", () => this.hideTip(), { passive: true, capture: true });
    document.addEventListener("pointerup", () => setTimeout(() => {
      this.views.forEach(({ box, elements }, place) => {
        const selected = findSelected(box, elements);
        if (selected) this.#choose(place, ...selected);
      });
    }));
    sides.addEventListener("click", (event) => {
      const token = event.target.closest(".t");
      const place = this.views.findIndex(({ box }) => box.contains(event.target));
      if (!token || place < 0 || !getSelection().isCollapsed) return;
      const piece = Number(token.dataset.piece);
      this.#choose(place, piece, piece);
      this.toggleFlag(place, piece);
      this.#choose(place, piece, piece);
    });
  }
}

const isEqual = (ones, others) => ones === others || (Boolean(ones) && ones.length === others?.length && ones.every((value, index) => value === others[index]));
const isOvertaken = (error) => error instanceof Refusal && error.status === 409;
