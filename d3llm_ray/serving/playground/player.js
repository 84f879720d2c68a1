// Replays what was recorded: of one lane forward by forward, of a race as the lanes' forwards came.

import { $, say } from "./dom.js";

export class Player {
  #moments = [];
  #index = 0;
  #frame = null;
  #paced = false; // a user has chosen the speed

  /** `onShow(counts)` draws each lane after so many of its events. */
  constructor(onShow) {
    this.onShow = onShow;
    this.scrubber = $("scrubber");
    this.controls = ["play", "back", "on", "scrubber"].map($);
    $("play").addEventListener("click", () => (this.#frame ? this.pause() : this.play()));
    $("back").addEventListener("click", () => this.#step(-1));
    $("on").addEventListener("click", () => this.#step(1));
    $("speed").addEventListener("change", () => (this.#paced = true));
    this.scrubber.addEventListener("input", () => {
      this.pause();
      this.#show(Number(this.scrubber.value));
    });
  }

  /** Take up finished recordings, shown as they ended. */
  load(recordings) {
    this.pause();
    this.#moments = momentsOf(recordings);
    const last = this.#moments.length - 1;
    this.scrubber.max = last;
    for (const control of this.controls) control.disabled = last < 1;
    if (!this.#paced) $("speed").value = gentleSpeed(this.#moments[last].at - this.#moments[Math.min(1, last)].at);
    this.#show(last);
  }

  /** Nothing can be replayed while an answer comes, or before the first. */
  rest(text) {
    this.pause();
    this.#moments = [];
    for (const control of this.controls) control.disabled = true;
    say($("moment"), text);
  }

  pause() {
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
    say($("play"), "Play");
  }

  #step(by) {
    this.pause();
    this.#show(Math.min(Math.max(this.#index + by, 0), this.#moments.length - 1));
  }

  /** From where the scrubber is, or from the beginning; the waits between forwards are the recorded ones. */
  play() {
    const last = this.#moments.length - 1;
    if (this.#index === last) this.#show(0);
    say($("play"), "Pause");
    let before = performance.now();
    let clock = this.#moments[Math.max(this.#index, 1)].at; // the first forward at once: what came before is waiting
    const tick = (now) => {
      clock += (now - before) * Number($("speed").value);
      before = now;
      let index = this.#index;
      while (index < last && this.#moments[index + 1].at <= clock) index += 1;
      if (index !== this.#index) this.#show(index);
      if (index === last) this.pause();
      else this.#frame = requestAnimationFrame(tick);
    };
    this.#frame = requestAnimationFrame(tick);
  }

  #show(index) {
    this.#index = index;
    this.scrubber.value = index;
    const { at, counts } = this.#moments[index];
    const last = this.#moments.length - 1;
    const place = counts.length === 1 ? `forward ${index} of ${last}` : `event ${index} of ${last}`;
    const text = `${place}, ${(at / 1000).toFixed(2)} s`;
    say($("moment"), text);
    this.scrubber.setAttribute("aria-valuetext", text);
    this.onShow(counts);
  }
}

/** Moments in the order of time: {at, counts}, the events that each recording has had by then. */
function momentsOf(recordings) {
  const counts = recordings.map(() => 0);
  const all = recordings.flatMap(({ events }, lane) => events.map(({ at }) => ({ at, lane })));
  const moments = [{ at: 0, counts: [...counts] }];
  for (const { at, lane } of all.sort((a, b) => a.at - b.at)) {
    counts[lane] += 1;
    moments.push({ at, counts: [...counts] });
  }
  return moments;
}

/** A speed at which a recording of so many milliseconds can be watched. */
function gentleSpeed(duration) {
  return duration > 2500 ? "1" : duration > 600 ? "0.25" : duration > 200 ? "0.1" : "0.02";
}
