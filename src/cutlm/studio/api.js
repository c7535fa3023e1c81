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
  #known = new Map(); // by item: the newest verdict that the server is known to have
  #isRunning = false;
  #isStored = false; // whether changes are in the storage of the browser

  /** `handlers`: onState(kind, text), onSaved(index, verdict, pace), onConflict(index, theirs, mine). */
  constructor(storageName, keys, handlers) {
    Object.assign(this, { storageName, keys, handlers });
    addEventListener("pagehide", () => this.#store());
  }

  /** Sends again what earlier pages could not save. A second change of one verdict stays for the page after this. */
  restore() {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(`${this.storageName} `));
    for (const name of names) {
      const left = {};
      for (const [key, { verdict, revision }] of Object.entries(JSON.parse(localStorage.getItem(name)))) {
        const index = this.keys.indexOf(key);
        if (index < 0 || this.#waiting.has(index)) {
          left[key] = { verdict, revision };
          continue;
        }
        this.#known.set(index, { revision });
        this.#waiting.set(index, verdict);
      }
      if (Object.keys(left).length) localStorage.setItem(name, JSON.stringify(left));
      else localStorage.removeItem(name);
    }
    if (!this.#waiting.size) return;
    this.#store();
    this.#run();
  }

  /** The newest of a verdict that the server sent, what it has saved meanwhile, and a change that waits. */
  reconcile(index, verdict) {
    if (this.#waiting.has(index)) return { ...verdict, ...this.#waiting.get(index) };
    if (verdict.revision >= this.#revise(index)) this.#known.set(index, verdict);
    return this.#known.get(index);
  }

  isSaving(index) {
    return this.#waiting.has(index);
  }

  save(index, verdict) {
    const { state, judgment, wrong_spans, unflagged_spans, i_ans } = verdict;
    this.#waiting.set(index, { state, judgment, wrong_spans, unflagged_spans, i_ans });
    if (this.#isStored) this.#store();
    this.#run();
  }

  #revise(index) {
    return this.#known.get(index)?.revision ?? 0;
  }

  #store() {
    const name = `${this.storageName} ${TAB}`;
    const entries = [...this.#waiting].map(([index, verdict]) => [
      this.keys[index],
      { verdict, revision: this.#revise(index) },
    ]);
    this.#isStored = entries.length > 0;
    if (this.#isStored) localStorage.setItem(name, JSON.stringify(Object.fromEntries(entries)));
    else localStorage.removeItem(name);
  }

  async #run() {
    this.handlers.onState("saving", "saving \u2026");
    if (this.#isRunning) return;
    this.#isRunning = true;
    while (this.#waiting.size) {
      const [index, verdict] = this.#waiting.entries().next().value;
      const body = { ...verdict, revision: this.#revise(index), tab: TAB };
      const keepalive = new TextEncoder().encode(JSON.stringify(body)).length < MAX_KEPT_ALIVE;
      try {
        const answer = await request(`/api/items/${index}`, { method: "PUT", body, keepalive });
        this.#known.set(index, answer.verdict);
        if (this.#waiting.get(index) === verdict) this.#waiting.delete(index);
        this.handlers.onSaved(index, answer.verdict, answer.pace);
      } catch (error) {
        if (error instanceof Refusal && error.status === 409) {
          const mine = this.#waiting.get(index);
          this.#waiting.delete(index);
          this.#known.set(index, error.content.verdict);
          this.handlers.onConflict(index, error.content.verdict, mine);
        } else if (error instanceof Refusal && error.status === 422) {
          this.#waiting.delete(index);
          this.handlers.onState("bad", `not saved: ${error.message}`);
          if (this.#isStored) this.#store();
          continue;
        } else {
          this.#store();
          const reason = error instanceof Refusal && error.status !== 403 ? error.message : "the server has stopped";
          this.handlers.onState("bad", `not saved: ${reason}. Start it again; what you wrote is kept in this browser.`);
          await wait(1000);
          continue;
        }
      }
      if (this.#isStored) this.#store();
      if (!this.#waiting.size) this.handlers.onState("saved", "saved");
    }
    this.#isRunning = false;
  }
}
