// Requests to the server, and saving: every change is sent at once, and kept here until it is saved.

export const TAB = crypto.randomUUID();

export class Refusal extends Error {
  constructor(status, content) {
    super(content.problem ?? `the server answered ${status}`);
    Object.assign(this, { status, content });
  }
}

/** Sends a request and returns the content of the answer; throws a Refusal, or a TypeError if the server is away. */
export async function request(path, { method = "GET", body, signal, keepalive } = {}) {
  const headers = body === undefined ? {} : { "content-type": "application/json" };
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, keepalive });
  const text = await answer.text();
  let content = {};
  try {
    content = JSON.parse(text);
  } catch {
    content = { problem: text };
  }
  if (!answer.ok) throw new Refusal(answer.status, content);
  return content;
}

const MAX_KEPT_ALIVE = 60_000; // bytes that browsers send for a page that is being closed
const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/**
 * Saves verdicts, one after the other; of several changes of one verdict that wait, only the last is sent.
 *
 * While the server is away, changes are also in the storage of the browser, so that they survive a reload and are saved
 * once the server is back at the same address.
 */
export class Saver {
  #waiting = new Map(); // by item: the verdict to save
  #revisions = new Map(); // by item: the revision that the verdict changes
  #isRunning = false;

  /** `handlers`: onState(kind, text), onSaved(index, verdict, pace), onConflict(index, theirs, mine). */
  constructor(storageName, keys, handlers) {
    Object.assign(this, { storageName, keys, handlers });
    addEventListener("pagehide", () => this.#store());
  }

  /** Sends again what an earlier page could not save. */
  restore() {
    const stored = JSON.parse(localStorage.getItem(this.storageName) ?? "{}");
    localStorage.removeItem(this.storageName);
    for (const [key, { verdict, revision }] of Object.entries(stored)) {
      const index = this.keys.indexOf(key);
      if (index < 0) continue;
      this.#revisions.set(index, revision);
      this.save(index, verdict);
    }
  }

  /** Notes the revision that the server has. */
  note(index, revision) {
    if (!this.#waiting.has(index)) this.#revisions.set(index, revision);
  }

  isSaving(index) {
    return this.#waiting.has(index);
  }

  /** Drops a change, as after a conflict. */
  drop(index, revision) {
    this.#waiting.delete(index);
    this.#revisions.set(index, revision);
  }

  save(index, verdict) {
    const { state, judgment, wrong_spans, unflagged_spans, i_ans } = verdict;
    this.#waiting.set(index, { state, judgment, wrong_spans, unflagged_spans, i_ans });
    this.handlers.onState("saving", "saving \u2026");
    this.#run();
  }

  #store() {
    if (!this.#waiting.size) {
      localStorage.removeItem(this.storageName);
      return;
    }
    const entries = [...this.#waiting].map(([index, verdict]) => [
      this.keys[index],
      { verdict, revision: this.#revisions.get(index) ?? 0 },
    ]);
    localStorage.setItem(this.storageName, JSON.stringify(Object.fromEntries(entries)));
  }

  async #run() {
    if (this.#isRunning) return;
    this.#isRunning = true;
    let isAway = false;
    while (this.#waiting.size) {
      const [index, verdict] = this.#waiting.entries().next().value;
      const body = { ...verdict, revision: this.#revisions.get(index) ?? 0, tab: TAB };
      const keepalive = JSON.stringify(body).length < MAX_KEPT_ALIVE;
      try {
        const answer = await request(`/api/items/${index}`, { method: "PUT", body, keepalive });
        this.#revisions.set(index, answer.verdict.revision);
        if (this.#waiting.get(index) === verdict) this.#waiting.delete(index);
        if (isAway) this.#store();
        isAway = false;
        this.handlers.onSaved(index, answer.verdict, answer.pace);
      } catch (error) {
        if (error instanceof Refusal && error.status === 409) {
          const mine = this.#waiting.get(index);
          this.drop(index, error.content.verdict.revision);
          this.handlers.onConflict(index, error.content.verdict, mine);
        } else if (error instanceof Refusal && error.status === 422) {
          this.#waiting.delete(index);
          this.handlers.onState("bad", `not saved: ${error.message}`);
          continue;
        } else {
          isAway = true;
          this.#store();
          const reason = error instanceof Refusal && error.status !== 403 ? error.message : "the server has stopped";
          this.handlers.onState("bad", `not saved: ${reason}. Start it again; what you wrote is kept in this browser.`);
          await wait(1000);
          continue;
        }
      }
      if (!this.#waiting.size) this.handlers.onState("saved", "saved");
    }
    this.#isRunning = false;
  }
}
