// A lane: which model and decoder answer, live figures, and the canvas. The page shows one, or a race of some.

import { Canvas } from "./canvas.js";
import { element, fill, say } from "./dom.js";
import { Recording } from "./recording.js";

const FIGURES = [
  ["perForward", "tokens / forward", (value) => value.toFixed(2)],
  ["perSecond", "tokens / s", (value) => (value < 100 ? value.toFixed(1) : value.toFixed(0))],
  ["forwards", "forwards", String],
  ["tokens", "tokens", String],
  ["seconds", "seconds", (value) => value.toFixed(2)],
];
const ENDS = { stopped: "stopped", failed: "failed" };
let made = 0;

export class Lane {
  recording = null;
  /** `models` as of `choices.js`; `events` has `onChoice()` and `onInspect(text)`. */
  constructor(models, { model, decoder }, { onChoice, onInspect }) {
    made += 1;
    this.models = models;
    this.modelSelect = element("select", { onchange: () => this.#choose(onChoice) });
    this.decoderSelect = element("select", { onchange: () => onChoice() });
    this.place = element("p", { class: "place" });
    this.grid = element("div", { class: "canvas", role: "grid", "aria-readonly": "true" });
    this.canvas = new Canvas(this.grid, onInspect);
    this.values = {};
    this.element = element(
      "article",
      { class: "lane", "aria-labelledby": `lane-${made}` },
      element(
        "div",
        { class: "lane-head" },
        element("h3", { id: `lane-${made}`, class: "unseen" }),
        element("label", { class: "inline" }, "Model ", this.modelSelect),
        element("label", { class: "inline" }, "Decoder ", this.decoderSelect),
        this.place,
      ),
      this.#figureList(),
      this.grid,
    );
    fill(this.modelSelect, models.map(({ id }) => id), model);
    this.#fillDecoders(decoder);
  }

  #figureList() {
    return element(
      "dl",
      { class: "figures" },
      ...FIGURES.map(([name, unit]) => {
        this.values[name] = element("dd", { "data-figure": name }, "–");
        return element("div", {}, element("dt", {}, unit), this.values[name]);
      }),
    );
  }

  #choose(onChoice) {
    this.#fillDecoders(this.decoderSelect.value);
    onChoice();
  }

  #fillDecoders(wanted) {
    const { decoders } = this.model;
    const usual = decoders.find((each) => each.usual).name;
    const names = decoders.map(({ name }) => name);
    fill(this.decoderSelect, names, names.includes(wanted) ? wanted : usual);
    this.#name();
  }

  #name() {
    say(this.element.querySelector("h3"), this.name);
    this.grid.setAttribute("aria-label", `Canvas of ${this.name}`);
  }

  get model() {
    return this.models.find(({ id }) => id === this.modelSelect.value);
  }

  get decoder() {
    return this.model.decoders.find(({ name }) => name === this.decoderSelect.value);
  }

  get name() {
    return `${this.model.id} · ${this.decoder.name}`;
  }

  /** Take up a recording (null: none), which `draw` shows. */
  show(recording) {
    this.recording = recording;
    this.#name();
    say(this.place, "");
  }

  /** Draw the canvas after `count` events; without a recording, the empty one that a question would begin with. */
  draw(count, { colour, lastForward, maxTokens }) {
    const blank = () => new Recording({ name: this.name, maxTokens, blockSize: this.decoder.blockSize });
    const source = this.recording ?? blank();
    const state = source.canvas(count);
    this.canvas.draw(state, { colour, lastForward, maxTokens: source.maxTokens });
    const figures = source.figures(count);
    for (const [name, , format] of FIGURES) say(this.values[name], count ? format(figures[name]) : "–");
  }

  /** Say how it ended, if it has; in a race also as which, and why not. */
  end(racing, order) {
    const { state, endedAt, error } = this.recording;
    const told = order && `${order}, ${(endedAt / 1000).toFixed(2)} s`;
    say(this.place, (racing && error?.message) || ENDS[state] || told || "");
    this.element.dataset.order = order ?? "";
  }

  lock(locked) {
    this.modelSelect.disabled = locked;
    this.decoderSelect.disabled = locked;
  }
}
