// The server's routes, by addresses relative to the page: they hold behind a route prefix too.

const KEY = "d3llm-ray key";

/** What the server, or the network, refused: `status` 0 is no answer, `param` names the field at fault. */
export class Refusal extends Error {
  constructor(status, message, { param = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter; // seconds
  }
}

/** The key of this tab; it goes into a header and nowhere else. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the server does not answer");
  }
  if (!response.ok) throw await refusalOf(response);
  return response;
}

async function refusalOf(response) {
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  const retryAfter = Number.isFinite(seconds) ? seconds : null;
  try {
    const { error } = await response.json();
    return new Refusal(response.status, error.message, { param: error.param, retryAfter });
  } catch {
    // A proxy's own page is not in OpenAI's shape.
    return new Refusal(response.status, response.statusText || "no reason given", { retryAfter });
  }
}

/** The cards of `GET /v1/models`. */
export async function models() {
  const response = await request("v1/models");
  return (await response.json()).data;
}

/**
 * The chunks of a streamed chat completion, as objects. Throws a `Refusal` for an error before or in the stream, and
 * for a stream that ends without `[DONE]`; an `AbortError` when `signal` says stop.
 */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(response.status, chunk.error.message, { param: chunk.error.param });
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Refusal) throw error;
    throw new Refusal(response.status, "the stream broke off");
  }
  throw new Refusal(response.status, "the stream broke off: it ended without [DONE]");
}

/** The data of server-sent events (WHATWG HTML, section 9.2), without the fields that this API does not use. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}
