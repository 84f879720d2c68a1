// Decoding settings as sliders. One that nobody has moved is not sent: the server's own value holds.

import { element, say } from "./dom.js";

const NEVER = 10000; // forwards; d3LLM's own default for "no refresh by interval"
const range = (from, to, step) => Array.from({ length: Math.round((to - from) / step) + 1 }, (_, i) => from + i * step);

const SETTINGS = [
  {
    name: "entropy_threshold",
    label: "Entropy threshold",
    stops: range(0, 40, 1).map((twentieths) => twentieths / 20),
    format: (value) => `${value.toFixed(2)} nats`,
    brief: (value) => value.toFixed(2),
  },
  {
    name: "cache_delay",
    label: "Cache delay",
    stops: range(1, 16, 1),
    format: (value) => `${value} ${value === 1 ? "forward" : "forwards"}`,
  },
  {
    name: "refresh_interval",
    label: "Cache refresh",
    stops: [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, NEVER],
    format: (value) => (value >= NEVER ? "never" : value === 1 ? "every forward" : `every ${value} forwards`),
  },
];
const TOKENS_STEP = 8;
const USUAL_TOKENS = 128;

export class Sliders {
  #chosen = new Map(); // by name, what a user has set
  #shown = [];
  #marked = null;

  /** `onChange()` is called when a value has changed. */
  constructor(list, summary, onChange) {
    this.list = list;
    this.summary = summary;
    this.onChange = onChange;
  }

  /** Show what the lanes' decoders have, at the first one's values. */
  offer(lanes) {
    const settings = Object.assign({}, ...lanes.map(({ decoder }) => decoder.settings).reverse());
    const limit = Math.min(...lanes.map(({ model }) => model.maxTokensLimit));
    const tokens = { name: "max_tokens", label: "Answer length", format: (value) => `${value} tokens` };
    tokens.stops = [...range(TOKENS_STEP, limit, TOKENS_STEP)].filter((value) => value < limit).concat(limit);
    const wanted = [tokens, ...SETTINGS.filter(({ name }) => name in settings)];
    const usual = { ...settings, max_tokens: Math.min(USUAL_TOKENS, limit) };
    const focused = this.#shown.find(({ input }) => input === document.activeElement)?.name;
    this.#shown = wanted.map((setting) => this.#slider(setting, usual[setting.name]));
    this.list.replaceChildren(...this.#shown.map(({ label }) => label));
    this.#shown.find(({ name }) => name === focused)?.input.focus();
    this.#say();
  }

  #slider({ name, label, stops, format, brief = format }, usual) {
    const values = [...new Set([...stops, usual])].sort((a, b) => a - b);
    const input = element("input", { type: "range", min: 0, max: values.length - 1, step: 1, name, "aria-label": label });
    const shown = element("span", { class: "value" });
    const slider = { name, input, usual, values, format, brief, shown };
    slider.label = element("label", { class: "slider" }, element("span", { class: "name" }, label), shown, input);
    this.#set(slider, Math.min(this.#chosen.get(name) ?? usual, values.at(-1)));
    input.addEventListener("input", () => {
      this.#chosen.set(name, values[input.value]);
      this.#set(slider, values[input.value]);
      this.mark(null);
      this.#say();
      this.onChange();
    });
    return slider;
  }

  #set(slider, value) {
    slider.value = value;
    const place = slider.values.findIndex((each) => each >= value);
    slider.input.value = place < 0 ? slider.values.length - 1 : place;
    slider.input.setAttribute("aria-valuetext", slider.format(value));
    say(slider.shown, slider.brief(value));
    slider.label.classList.toggle("moved", this.#chosen.has(slider.name) && value !== slider.usual);
  }

  #say() {
    say(this.summary, this.#shown.map(({ format, value }) => format(value)).join(" · "));
  }

  reset() {
    this.#chosen.clear();
    for (const slider of this.#shown) this.#set(slider, slider.usual);
    this.mark(null);
    this.#say();
    this.onChange();
  }

  get maxTokens() {
    return this.#shown.find(({ name }) => name === "max_tokens").value;
  }

  /** What a user has moved, of the settings that a decoder has. */
  overrides({ settings }) {
    return Object.fromEntries([...this.#chosen].filter(([name]) => name in settings));
  }

  /** Mark the slider of a field that the server has refused; null takes the mark away. */
  mark(param) {
    if (this.#marked) this.#marked.input.removeAttribute("aria-invalid");
    this.#marked = this.#shown.find(({ name }) => [name, `diffusion.${name}`].includes(param)) ?? null;
    this.#marked?.input.setAttribute("aria-invalid", "true");
  }
}
