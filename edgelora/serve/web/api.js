// The server's API: requests, the server's errors as text, and streamed answers piece by piece.

const KEY = "edgelora.api-key";

export class ServerError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Kept for this tab only; no key is no header.
export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

export async function listModels() {
  const reply = await request("v1/models");
  return (await reply.json()).data;
}

// One model with all that its file tells, e.g. its sources.
export async function getModel(id) {
  return (await request(`v1/models/${encodeURIComponent(id)}`)).json();
}

// Yields the chunks of one answer, the last of which has the usage.
export async function* streamAnswer(body, signal) {
  const reply = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let isWhole = false;
  // Read to the end, so that the connection can be used again.
  for await (const data of events(reply.body)) {
    isWhole ||= data === "[DONE]";
    if (isWhole) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, reply.status, chunk.error.code);
    yield chunk;
  }
  if (!isWhole) throw new ServerError("The connection ended before the answer did.", reply.status);
}

// Paths are relative, so that the page also works behind a proxy that adds a prefix.
async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (reply.ok) return reply;
  const { error } = await reply.json().catch(() => ({}));
  throw new ServerError(error?.message ?? `HTTP ${reply.status}`, reply.status, error?.code);
}

// The data of each server-sent event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
