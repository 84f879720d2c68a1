// The page: connects its parts, asks, and draws what comes.

import { chat as ask, models as fetchModels, Refusal } from "./api.js";
import { HIGHEST_ENTROPY } from "./canvas.js";
import { Chat, describe } from "./chat.js";
import { MOST_LANES, offered, racers } from "./choices.js";
import { $, element, say } from "./dom.js";
import { Lane } from "./lane.js";
import { Player } from "./player.js";
import { askForKey, offerKey, offerThemes } from "./preferences.js";
import { Recording } from "./recording.js";
import { Sliders } from "./sliders.js";

const EXAMPLES = [
  "Tom has 12 apples. Tom buys 7 more. Then Tom loses 5 apples. How many apples does Tom have now?",
  "Sam has 5 apples. Sam gives away 2. How many apples does Sam have now?",
  "There are 18 coins in the box of Eva. Eva sells 4 of them. How many coins does Eva have now?",
];
const DRAWN_EVERY_MS = 30;
const NARROW = matchMedia("(max-width: 60rem)"); // as in page.css: the canvas is below the conversation
const PLACES = ["1st", "2nd", "3rd"];

let models = [];
let lanes = [];
let running = null; // the AbortController of what is being answered
let drawn = []; // events of each lane that are on the screen

const chat = new Chat({ onReplay: showExchange, onRetry: ({ prompt }) => send(prompt) });
const player = new Player(draw);
const sliders = new Sliders($("sliders"), $("settings-said"), () => lanes.every((lane) => !lane.recording) && draw());

const checked = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const racing = () => checked("mode") === "race";

async function connect() {
  if (running) return;
  lanes = []; // nothing can be asked until it is known again who answers
  $("send").disabled = true;
  $("problem").hidden = true;
  try {
    models = offered(await fetchModels());
    if (!models.length) throw new Refusal(200, "the server lists no model");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    say($("server"), "not connected");
    showProblem(describe(error), error.status === 401 ? ["Enter the key", askForKey] : ["Try again", connect]);
    return;
  }
  const decoders = new Set(models.flatMap((model) => model.decoders.map(({ name }) => name))).size;
  say($("server"), [count(models.length, "model"), count(decoders, "decoder")].join(", "));
  setLanes();
  $("send").disabled = false;
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

function showProblem(text, [label, action]) {
  $("problem").replaceChildren(element("p", {}, text), element("button", { type: "button", onclick: action }, label));
  $("problem").hidden = false;
}

/** Lanes of what a recording was made with, or those that the mode begins with. */
function setLanes(choices = racing() ? racers(models) : [{ model: models[0].id }]) {
  const events = { onChoice: forget, onInspect: (text) => say($("details"), text) };
  lanes = choices.map((choice) => new Lane(models, choice, events));
  $("lanes").replaceChildren(...lanes.map((lane) => lane.element));
  $("lanes").dataset.lanes = lanes.length;
  const alone = racers(models).length < 2;
  document.querySelector('input[value="race"]').disabled = alone;
  $("lane-count-label").hidden = !racing();
  $("earlier").disabled = racing();
  $("lane-count").value = lanes.length;
  say($("mode-note"), racing() ? "the message alone, all lanes at once" : alone ? "no race: the server lists one decoder" : "");
  say($("send"), racing() ? "Race" : "Ask");
  forget();
}

/** Back to empty canvases: what they showed was of other decoders, or has been cleared. */
function forget() {
  for (const lane of lanes) lane.show(null);
  sliders.offer(lanes);
  player.rest("nothing to replay yet");
  draw();
}

/** Draw every lane after so many of its events; without `counts`, after all of them. */
function draw(counts = lanes.map((lane) => lane.recording?.events.length ?? 0)) {
  const lastForward = Math.max(1, ...lanes.map((lane) => lane.recording?.events.at(-1)?.forward ?? 0));
  const colour = checked("colour");
  const context = { colour, lastForward, maxTokens: sliders.maxTokens };
  lanes.forEach((lane, index) => lane.draw(counts[index], context));
  drawn = counts;
  document.body.dataset.colour = colour;
  const ends = { entropy: ["0 nats", `${HIGHEST_ENTROPY} nat or more`], forward: ["forward 1", `forward ${lastForward + 1}`] };
  say($("scale-low"), ends[colour][0]);
  say($("scale-high"), ends[colour][1]);
}

async function send(prompt) {
  if (running || !lanes.length || !prompt.trim()) return;
  const race = racing();
  const earlier = !race && $("earlier").checked ? chat.history() : [];
  const messages = [...earlier, { role: "user", content: prompt }];
  const recordings = lanes.map((lane) => record(lane));
  lanes.forEach((lane, index) => lane.show(recordings[index]));
  const exchange = chat.begin(prompt, recordings);
  setRunning(new AbortController());
  say($("status"), race ? "Racing." : "Answering.");
  player.rest("recording");
  if (NARROW.matches) $("lanes").scrollIntoView();
  const live = setInterval(() => requestAnimationFrame(() => running && show(exchange)), DRAWN_EVERY_MS);
  const { signal } = running;
  await Promise.all(lanes.map((lane) => run(lane, messages, signal).then(place)));
  clearInterval(live);
  setRunning(null);
  finish(exchange);
}

function record(lane) {
  const { decoder, model } = lane;
  const maxTokens = Math.min(sliders.maxTokens, model.maxTokensLimit);
  const recording = new Recording({ name: lane.name, maxTokens, blockSize: decoder.blockSize });
  recording.choice = { model: model.id, decoder: decoder.name };
  return recording;
}

function show(exchange) {
  draw();
  chat.grow(exchange);
}

/** Ask for one lane; whatever becomes of it is in its recording. */
async function run(lane, messages, signal) {
  const { recording, model, decoder } = lane;
  const named = decoder.usual ? {} : { decoder: decoder.name };
  const diffusion = { events: true, ...named, ...sliders.overrides(decoder) };
  const body = { model: model.id, messages, max_tokens: recording.maxTokens, diffusion };
  const began = performance.now();
  const elapsed = () => performance.now() - began;
  recording.state = "running";
  try {
    for await (const chunk of ask(body, signal)) recording.add(chunk, elapsed());
    recording.end("done", elapsed());
  } catch (error) {
    if (error.name === "AbortError") recording.end("stopped", elapsed());
    else recording.end("failed", elapsed(), error instanceof Refusal ? error : unreadable(error));
  }
}

function unreadable(error) {
  console.error(error);
  return new Refusal(200, "the server said something that this page cannot read");
}

function finish(exchange) {
  draw();
  chat.end(exchange);
  const { recordings } = exchange;
  const refusal = recordings.find(({ error }) => error)?.error;
  sliders.mark(refusal?.param ?? null);
  if (refusal?.status === 401) askForKey();
  if (recordings.some(({ events }) => events.length)) player.load(recordings);
  else player.rest("nothing to replay");
  say($("status"), announcement(recordings));
}

/** Who has finished by now, and in a race in which order. */
function place() {
  const order = lanes
    .map(({ recording }) => recording)
    .filter(({ state }) => state === "done")
    .sort((a, b) => a.endedAt - b.endedAt);
  for (const lane of lanes) lane.end(racing(), racing() ? PLACES[order.indexOf(lane.recording)] : undefined);
}

function announcement(recordings) {
  if (recordings.length > 1) return `Race over: ${lanes.map((lane) => `${lane.name} ${lane.place.textContent}`).join("; ")}`;
  const [{ state, text, error }] = recordings;
  if (error) return describe(error);
  const { tokens, forwards } = recordings[0].figures();
  return `${state === "done" ? "Answer" : "Stopped"}: ${text} (${tokens} tokens in ${forwards} forwards)`;
}

/** Bring an earlier exchange back to the canvas, and play it. */
function showExchange({ recordings }) {
  if (running) return;
  document.querySelector(`input[value="${recordings.length > 1 ? "race" : "one"}"]`).checked = true;
  setLanes(recordings.map(({ choice }) => choice));
  lanes.forEach((lane, index) => lane.show(recordings[index]));
  place();
  player.load(recordings);
  player.play();
}

function setRunning(controller) {
  const focused = document.activeElement;
  running = controller;
  const active = controller !== null;
  $("stop").hidden = !active;
  $("send").hidden = active;
  if (active && focused === $("send")) $("stop").focus();
  if (!active && focused === $("stop")) $("prompt").focus();
  for (const lane of lanes) lane.lock(active);
  for (const control of [$("clear"), $("lane-count"), ...document.querySelectorAll('input[name="mode"]')]) {
    control.disabled = active || (control.value === "race" && racers(models).length < 2);
  }
}

function submit() {
  const prompt = $("prompt").value;
  if (running || !lanes.length || !prompt.trim()) return;
  $("prompt").value = "";
  send(prompt);
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  $("composer").addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    chat.clear();
    forget();
    $("prompt").focus();
  });
  $("reset").addEventListener("click", () => sliders.reset());
  for (const input of document.querySelectorAll('input[name="mode"]')) input.addEventListener("change", () => setLanes());
  for (const input of document.querySelectorAll('input[name="colour"]')) {
    input.addEventListener("change", () => draw(drawn));
  }
  $("lane-count").addEventListener("change", () => {
    const choices = lanes.map((lane) => ({ model: lane.model.id, decoder: lane.decoder.name }));
    const more = racers(models).concat(choices);
    setLanes([...choices, ...more].slice(0, Math.min(Number($("lane-count").value), MOST_LANES)));
  });
  const example = (text) => {
    $("prompt").value = text;
    $("prompt").focus();
  };
  const button = (text) => element("button", { type: "button", class: "example", onclick: () => example(text) }, text);
  $("examples").append(...EXAMPLES.map((text) => element("li", {}, button(text))));
}

$("settings").open = !NARROW.matches;
offerThemes();
offerKey(connect);
listen();
connect();
