// One canvas: a cell a response position, in its blocks. It draws a state and keeps the cells that stay.

import { element, say } from "./dom.js";
import { isSpecial } from "./recording.js";

export const HIGHEST_ENTROPY = 1; // nats at which the scale ends
const MARKS = { "\n": "↵", "\n\n": "↵↵", "\t": "⇥", " ": "␣", "": "ε" };
const NAMES = { "\n": "line break", "\n\n": "two line breaks", "\t": "tab", " ": "space", "": "nothing" };

/** How a token is shown in its cell, and how it is called where it is described. */
function shown(text) {
  if (isSpecial(text)) return { mark: "·", name: `special token ${text}`, dim: true };
  return { mark: MARKS[text] ?? text, name: NAMES[text] ?? text, dim: text in MARKS };
}

export class Canvas {
  #element;
  #onInspect;
  #cells = [];
  #rows = [];
  #bounds = "";
  #state = null;
  #context = null;
  #inspected = null;

  /** `onInspect(text)` is told what is known of the cell under the pointer or the focus. */
  constructor(grid, onInspect) {
    this.#element = grid;
    this.#onInspect = onInspect;
    grid.addEventListener("keydown", (event) => this.#move(event));
    grid.addEventListener("focusin", (event) => this.#inspect(event.target, true));
    grid.addEventListener("pointerover", (event) => this.#inspect(event.target, false));
  }

  /** `colour` is "entropy" or "forward"; `lastForward` ends the scale of the latter; `maxTokens` ends the answer. */
  draw(state, context) {
    this.#state = state;
    this.#context = context;
    const bounds = state.blocks.map((block) => block.end).join();
    if (bounds !== this.#bounds) this.#lay(state.blocks);
    this.#bounds = bounds;
    const frontier = state.cells.indexOf(null);
    const end = state.cells.findIndex((token) => token !== null && isSpecial(token.text));
    this.#cells.forEach((cell, position) => {
      this.#drawCell(cell, position, position === end);
      cell.classList.toggle("open", position < state.opened && !state.ended);
      cell.classList.toggle("frontier", position === frontier && cell.classList.contains("open"));
    });
    state.blocks.forEach((block, index) => {
      const { row, word } = this.#rows[index];
      row.dataset.state = block.state;
      say(word, block.state);
    });
    if (this.#inspected !== null) this.#tell(this.#inspected);
  }

  #lay(blocks) {
    this.#cells = [];
    this.#rows = [];
    this.#inspected = null;
    const rows = blocks.map(({ start, end }, index) => {
      const cells = element("div", { class: "cells", role: "presentation" });
      for (let position = start; position < end; position += 1) {
        const cell = element("span", { class: "cell", role: "gridcell", tabindex: position ? "-1" : "0" });
        this.#cells.push(cell);
        cells.append(cell);
      }
      const word = element("span");
      const label = element("span", { class: "label", role: "rowheader" }, blocks.length > 1 ? `${index + 1} ` : "", word);
      const row = element("div", { class: "block", role: "row" }, label, cells);
      this.#rows.push({ row, word });
      return row;
    });
    this.#element.replaceChildren(...rows);
  }

  #drawCell(cell, position, ends) {
    const token = this.#state.cells[position];
    const { colour, lastForward, maxTokens } = this.#context;
    const { mark, name, dim } = token ? shown(token.text) : { mark: "", name: "masked", dim: false };
    say(cell, ends ? "∎" : mark);
    cell.classList.toggle("revealed", token !== null);
    cell.classList.toggle("special", dim);
    cell.classList.toggle("long", mark.length > 5);
    cell.classList.toggle("longer", mark.length > 6);
    cell.classList.toggle("beyond", position >= maxTokens);
    const share = !token ? 0 : colour === "entropy" ? token.entropy / HIGHEST_ENTROPY : token.forward / lastForward || 0;
    cell.style.setProperty("--share", Math.min(share, 1).toFixed(3));
    const value = token ? `, entropy ${token.entropy.toFixed(2)}, forward ${token.forward + 1}` : "";
    const label = `${position + 1}: ${name}${value}`;
    if (cell.getAttribute("aria-label") !== label) cell.setAttribute("aria-label", label);
  }

  #inspect(target, focused) {
    const position = this.#cells.indexOf(target);
    if (position < 0) return;
    if (focused) this.#rove(position);
    this.#inspected = position;
    this.#tell(position);
  }

  #tell(position) {
    const { cells, blocks } = this.#state;
    const token = cells[position];
    const index = blocks.findIndex((block) => position < block.end);
    const parts = [`Position ${position + 1} of ${cells.length}`];
    if (token) {
      const { name, dim } = shown(token.text);
      parts.push(dim ? name : `“${token.text}”`);
      parts.push(`entropy ${token.entropy.toFixed(4)} nats`, `revealed by forward ${token.forward + 1}`);
    } else parts.push("masked");
    if (blocks.length > 1) parts.push(`block ${index + 1}, ${blocks[index].state}`);
    if (position >= this.#context.maxTokens) parts.push("beyond max_tokens: never part of the answer");
    this.#onInspect(parts.join(" · "));
  }

  #rove(position) {
    for (const cell of this.#cells) {
      if (cell.tabIndex === 0) cell.tabIndex = -1;
    }
    this.#cells[position].tabIndex = 0;
  }

  #move(event) {
    const position = this.#cells.indexOf(event.target);
    if (position < 0 || event.altKey || event.metaKey) return;
    const columns = getComputedStyle(event.target.parentElement).gridTemplateColumns.split(" ").length;
    const block = this.#state.blocks.find(({ end }) => position < end);
    const [first, last] = event.ctrlKey ? [0, this.#cells.length - 1] : [block.start, block.end - 1];
    const places = {
      ArrowLeft: position - 1,
      ArrowRight: position + 1,
      ArrowUp: position - columns,
      ArrowDown: position + columns,
      Home: first,
      End: last,
    };
    if (!(event.key in places)) return;
    event.preventDefault();
    this.#cells[places[event.key]]?.focus();
  }
}
