// The conversation: turns as text, what is sent along with the next message, and what became of each answer.

import { $, element, say } from "./dom.js";

export class Chat {
  #exchanges = []; // {prompt, name, recording, elements}

  /** `onReplay(exchange)` and `onRetry(exchange)` are told of a turn's buttons. */
  constructor({ onReplay, onRetry }) {
    this.onReplay = onReplay;
    this.onRetry = onRetry;
    this.log = $("turns");
  }

  /** Messages of the answers that came, and of those that were stopped with something said. */
  history() {
    const told = this.#exchanges.filter(({ recordings }) => recordings.length === 1 && isTold(recordings[0]));
    return told.flatMap(({ prompt, recordings }) => [
      { role: "user", content: prompt },
      { role: "assistant", content: recordings[0].text },
    ]);
  }

  /** Begin an exchange: a message, and one recording or a race of some. */
  begin(prompt, recordings) {
    $("welcome").hidden = true;
    const text = element("p", { class: "text" });
    const note = element("p", { class: "note" });
    const answer = element(
      "article",
      { class: "turn answer", "aria-busy": "true" },
      element("h3", {}, recordings.length > 1 ? `Race of ${recordings.length}` : recordings[0].name),
      text,
      note,
    );
    const asked = element("article", { class: "turn asked" }, element("h3", {}, "You"));
    asked.append(element("p", { class: "text" }, prompt));
    const exchange = { prompt, recordings, answer, text, note };
    this.#exchanges.push(exchange);
    this.log.append(asked, answer);
    this.#follow();
    return exchange;
  }

  /** Show what has come so far. */
  grow({ recordings, text }) {
    const near = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    if (recordings.length === 1) say(text, recordings[0].text);
    if (near) this.#follow();
  }

  /** Say how it ended, and offer what can be done now. */
  end(exchange) {
    const { recordings, answer, text, note } = exchange;
    this.grow(exchange);
    answer.setAttribute("aria-busy", "false");
    if (recordings.length > 1) text.replaceChildren(...recordings.map(raceLine));
    else say(note, noteOf(recordings[0]));
    const failed = recordings.find(({ error }) => error);
    if (failed) answer.append(this.#failure(exchange, failed.error));
    if (recordings.some(({ events }) => events.length)) {
      note.append(element("button", { type: "button", class: "quiet", onclick: () => this.onReplay(exchange) }, "Replay"));
    }
    this.#follow();
  }

  #failure(exchange, error) {
    const again = element("button", { type: "button" }, "Ask again");
    const box = element("div", { class: "problem" }, element("p", {}, describe(error)), again);
    again.addEventListener("click", () => {
      box.remove();
      this.onRetry(exchange);
    });
    const wait = (seconds) => {
      again.disabled = seconds > 0;
      say(again, seconds > 0 ? `Ask again in ${seconds} s` : "Ask again");
      if (seconds > 0) setTimeout(wait, 1000, seconds - 1);
    };
    wait(error.retryAfter ?? 0);
    return box;
  }

  clear() {
    this.#exchanges = [];
    this.log.replaceChildren($("welcome"));
    $("welcome").hidden = false;
  }

  #follow() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}

function isTold({ state, text }) {
  return state === "done" || (state === "stopped" && text !== "");
}

function noteOf(recording) {
  const { tokens, forwards } = recording.figures();
  const counted = `${tokens} tokens in ${forwards} forwards`;
  if (recording.state === "done") return recording.finishReason === "length" ? `${counted}, cut at its length` : counted;
  return recording.state === "stopped" ? `stopped after ${counted}` : "";
}

function raceLine({ name, text, state }) {
  return element("span", { class: "race-line" }, element("b", {}, name), text || `(${state})`);
}

/** A refusal in words, with what can be done about it. */
export function describe({ status, message, param, retryAfter }) {
  if (status === 0) return "The server does not answer. Is it running?";
  if (status === 401) return `The server asks for a valid API key (${message}).`;
  if (status === 429) return `The server is full${retryAfter ? `: it asks to wait ${retryAfter} s` : ""}.`;
  if (status === 400 && param) {
    const reason = message.startsWith(`${param}: `) ? message.slice(param.length + 2) : message;
    return `The server refuses the field ${param}: ${reason}`;
  }
  if (status === 400) return `The server refuses the request: ${message}`;
  if (status === 200) return `Incomplete: ${message}.`;
  return `The server failed (${status}): ${message}`;
}
