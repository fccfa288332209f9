// Requests to the endpoint that served this page, under its route prefix.

const ROOT = new URL("../", import.meta.url);
const STORED = `sampo-key ${ROOT.pathname}`;

export const key = () => sessionStorage.getItem(STORED);
export const setKey = (value) => {
  if (value) sessionStorage.setItem(STORED, value);
  else sessionStorage.removeItem(STORED);
};

// An error answer (status 0: no answer), with a title and a sentence for the user.
export class Refused extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  // The endpoint's message as a sentence. A field name at its beginning stays as it is.
  get sentence() {
    const text = /^[a-z]+ /.test(this.message) ? this.message[0].toUpperCase() + this.message.slice(1) : this.message;
    return /[.!?]$/.test(text) ? text : `${text}.`;
  }

  get title() {
    const titles = {
      0: "The endpoint does not answer",
      401: "A key is needed",
      403: "Not allowed with this key",
      404: "Not found on this endpoint",
      413: "The request is too long",
      429: "Too many requests",
      503: "Not available now",
      504: "The answer took too long",
    };
    return titles[this.status] ?? (this.status < 500 ? "The endpoint refused this" : "The endpoint failed");
  }
}

const trimmed = (text) => text.replace(/\s+$/, "");

async function refusal(response) {
  const after = Number(response.headers.get("retry-after")) || null;
  let message = `It answered with status ${response.status}.`;
  try {
    const body = await response.json();
    if (typeof body?.error?.message === "string") message = body.error.message;
  } catch {
    // Not an answer of the endpoint, but of a proxy for example: only the status is known.
  }
  return new Refused(response.status, message, after);
}

// A 401 opens the login dialog, unless the call is `optional`. What is sent again with the same `id` is done once.
export async function call(path, { body, signal, id, optional = false } = {}) {
  const used = key();
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (id) headers["Idempotency-Key"] = id;
  if (used) headers.Authorization = `Bearer ${used}`;
  let response;
  try {
    const method = body === undefined ? "GET" : "POST";
    const content = body === undefined ? undefined : JSON.stringify(body);
    response = await fetch(new URL(path, ROOT), { method, headers, body: content, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "It may be restarting, or the connection is lost.");
  }
  if (!response.ok) {
    const refused = await refusal(response);
    if (response.status === 401 && !optional) window.dispatchEvent(new CustomEvent("locked", { detail: { used } }));
    throw refused;
  }
  return response;
}

export const get = async (path, { optional } = {}) => {
  const response = await call(path, { signal: AbortSignal.timeout(15000), optional }).catch((error) => {
    throw error instanceof Refused ? error : new Refused(0, "It took too long to answer.");
  });
  return { data: await response.json(), live: Number(response.headers.get("x-policy-version") ?? NaN) };
};

export const post = async (path, body, { optional, id } = {}) => (await call(path, { body, optional, id })).json();

// Streams a chat answer: yields {version, run}, then the chunks. Throws unless the answer came to its end.
export async function* chat(body, signal) {
  const options = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", { body: options, signal });
  yield { version: response.headers.get("x-policy-version"), run: response.headers.get("x-policy-run") };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, "The connection broke in the middle of the answer.");
    }
    if (piece.done) throw new Refused(0, "The answer was cut off before its end.");
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines.map(trimmed)) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.code === "timeout" ? 504 : 503, chunk.error.message);
      yield chunk;
    }
  }
}
