// The summary of all reviewers, and the training run.

import { request } from "./api.js";
import { byId, count, make, makeSvg, makeTable, makeText, percent } from "./text.js";

// ---- Summary ----

export async function showSummary(onOpen) {
  const content = byId("summary-content");
  let summary;
  try {
    summary = await request("/api/summary");
  } catch (error) {
    content.replaceChildren(makeText("p", "bad", error.message));
    return;
  }
  const { num_records: numRecords, num_satisfactory: numSatisfactory } = summary;
  const facts = [
    `${count(numRecords, "record")} in ${summary.out}: ${numSatisfactory} satisfactory, ${numRecords - numSatisfactory} unsatisfactory.`,
  ];
  if (summary.num_drafts) facts.push(`${count(summary.num_drafts, "draft")} without a verdict are not among them.`);
  if (summary.num_disputed) {
    facts.push(`${count(summary.num_disputed, "response")} with contradictory verdicts are in ${summary.out}.disputed.jsonl instead.`);
  }
  const rows = summary.reviewers.map(({ name, satisfactory, unsatisfactory, skipped }) =>
    [name, satisfactory, unsatisfactory, skipped, summary.num_items - satisfactory - unsatisfactory - skipped].map(String));
  const parts = [
    ...facts.map((fact) => makeText("p", "", fact)),
    ...(summary.problem ? [makeText("p", "bad", `The records cannot be written: ${summary.problem}`)] : []),
    wide(makeTable("", ["reviewer", "satisfactory", "unsatisfactory", "skipped", "open"], rows)),
    make("h2", "", "Agreement"),
  ];
  if (!summary.agreements.length) parts.push(make("p", "soft", "No two reviewers have judged the same response yet."));
  else {
    const header = ["reviewers", "judged by both", "equal verdicts", "overlap of marks"];
    parts.push(wide(makeTable("", header, summary.agreements.map((one) => [
      one.reviewers.join(", "),
      String(one.num_both),
      `${percent(one.num_equal, one.num_both)} (${one.num_equal})`,
      one.span_overlap === null ? "\u2013" : `${percent(one.span_overlap, 1)} (${count(one.num_marked, "response")})`,
    ]))));
    parts.push(make("p", "soft", "Overlap: characters that both marked as wrong, as a share of those that at least one did, where both call the response unsatisfactory."));
    const disputed = [...new Set(summary.agreements.flatMap((one) => one.disputed))].sort((one, other) => one - other);
    if (disputed.length) parts.push(listLinks("Contradictory verdicts", disputed, onOpen));
  }
  if (summary.doubtful.length) parts.push(listLinks("Your judgments that read like praise, but count as objections", summary.doubtful, onOpen));
  content.replaceChildren(...parts);
}

const wide = (table) => make("div", "wide", table);

function listLinks(title, indices, onOpen) {
  const line = make("p", "", `${title}: `);
  for (const index of indices) {
    const button = make("button", "", String(index + 1));
    button.type = "button";
    button.addEventListener("click", () => onOpen(index));
    line.append(button, " ");
  }
  return line;
}

// ---- Training ----

const CURVE = { left: 50, right: 590, top: 10, bottom: 165 };
let isReady = false;
let threshold = 1.1;

/** Shows the command that trains on the records. */
export async function showPlan(current) {
  threshold = current;
  if (!isReady) {
    isReady = true;
    byId("detector").addEventListener("change", () => showPlan(threshold));
    byId("start").addEventListener("click", () => send("POST"));
    byId("stop").addEventListener("click", () => send("DELETE"));
  }
  const body = { detector: byId("detector").value, threshold };
  const { command } = await request("/api/plan", { method: "POST", body });
  byId("command").firstChild.textContent = command;
}

async function send(method) {
  const body = method === "POST" ? { detector: byId("detector").value, threshold } : undefined;
  try {
    draw(await request("/api/training", { method, body }));
  } catch (error) {
    byId("training-state").textContent = error.message;
  }
}

/** Shows the run as it is now, and returns it. */
export async function showTraining() {
  const training = await request("/api/training");
  draw(training);
  return training;
}

function draw({ run, preparing, comparison, problem }) {
  const isRunning = run !== null && run.exit_code === null;
  byId("start").disabled = isRunning || preparing !== null;
  byId("stop").disabled = !isRunning;
  let state = "";
  if (problem) state = `stopped: ${problem}`;
  else if (preparing) state = `${preparing} \u2026`;
  else if (isRunning) state = run.losses.length ? `training, epoch ${run.losses.at(-1)[0].toFixed(2)}` : "starting \u2026";
  else if (run) state = run.exit_code === 0 ? `trained: ${run.folder}` : `ended with exit code ${run.exit_code}; see the output`;
  byId("training-state").textContent = state;
  byId("lines").textContent = run ? run.lines.join("\n") : "";
  drawLosses(run?.losses ?? []);
  if (run && (isRunning || preparing)) byId("command").firstChild.textContent = run.command;
  byId("comparison").replaceChildren(...(comparison ? [drawComparison(comparison)] : []));
}

function drawLosses(losses) {
  const svg = byId("losses");
  svg.toggleAttribute("hidden", losses.length === 0);
  if (!losses.length) return;
  const last = Math.max(losses.at(-1)[0], 1e-9);
  const largest = Math.max(...losses.map(([, loss]) => loss), 1e-9);
  const findX = (epoch) => CURVE.left + ((CURVE.right - CURVE.left) * epoch) / last;
  const findY = (loss) => CURVE.bottom - ((CURVE.bottom - CURVE.top) * Math.max(0, loss)) / largest;
  const parts = [];
  for (const loss of [0, largest / 2, largest]) {
    parts.push(makeSvg("line", { class: "grid", x1: CURVE.left, x2: CURVE.right, y1: findY(loss), y2: findY(loss) }));
    parts.push(makeSvg("text", { x: CURVE.left - 6, y: findY(loss) + 4, "text-anchor": "end" }, loss.toPrecision(2)));
  }
  parts.push(makeSvg("text", { x: CURVE.right, y: CURVE.bottom + 18, "text-anchor": "end" }, last.toFixed(2)));
  parts.push(makeSvg("text", { x: (CURVE.left + CURVE.right) / 2, y: CURVE.bottom + 30, "text-anchor": "middle" }, "epoch"));
  const corners = losses.map(([epoch, loss]) => `${findX(epoch).toFixed(1)} ${findY(loss).toFixed(1)}`);
  parts.push(makeSvg("path", { class: "curve", d: `M${corners.join("L")}` }));
  const [epoch, loss] = losses.at(-1);
  parts.push(makeSvg("circle", { cx: findX(epoch), cy: findY(loss), r: 4 }));
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", `Loss by epoch: ${loss.toPrecision(3)} at epoch ${epoch.toFixed(2)}`);
}

const KINDS = {
  satisfactory: "tokens of satisfactory responses",
  flagged: "flagged tokens of unsatisfactory ones",
  other: "other tokens of unsatisfactory ones",
};

function drawComparison(comparison) {
  const show = (mean) => (mean === null || mean === undefined ? "\u2013" : mean.toFixed(3).replace("-", "\u2212"));
  const rows = comparison.filter(({ num_tokens: num }) => num).map(({ kind, num_tokens: num, means: [before, after] }) =>
    [KINDS[kind], num.toLocaleString("en"), show(before), show(after), before === null || after === null ? "\u2013" : show(after - before)]);
  const table = makeTable("", ["log p per token, without the judgment", "tokens", "before", "after", "change"], rows);
  table.prepend(make("caption", "", "The judged responses, scored before and after training"));
  return wide(table);
}
