// The page: which models, the questions, and their answers as they come.

import { getModel, keepKey, listModels, streamAnswer } from "./api.js";
import { element } from "./dom.js";
import { originOf } from "./origin.js";

const part = (id) => document.getElementById(id);
const [model, other, message] = ["model", "other", "message"].map(part);
const ENDS = { stop: "complete", stopped: "stopped by you", failed: "not complete" };

let models = [];
let running = null; // the AbortController of the answers that are being streamed
let conversations = {}; // by model: the messages that this model has seen
let attempts = 0; // to list the models: only the latest one's reply counts

async function start() {
  const attempt = ++attempts;
  part("retry").hidden = true;
  let found;
  try {
    found = await listModels();
  } catch (error) {
    if (attempt !== attempts) return;
    report(error);
    const isLoading = error.code === "not_ready";
    if (isLoading) setTimeout(start, 1000);
    part("retry").hidden = isLoading || error.status === 401;
    return;
  }
  if (attempt !== attempts) return;
  models = found;
  report(null);
  const ids = models.map(({ id }) => [id, id]);
  if (models.some(isAdapter)) ids.push(["auto", "auto: what fits the message"]);
  fill(model, ids, models.find(isAdapter)?.id);
  fill(other, [["", "no other"], ...ids], "");
  part("choice").hidden = false;
  other.parentElement.hidden = models.length < 2;
  showChoice();
}

function fill(select, entries, initial) {
  const wanted = select.value || initial;
  select.replaceChildren(...entries.map(([value, title]) => new Option(title, value)));
  if (entries.some(([value]) => value === wanted)) select.value = wanted;
}

function chosen() {
  return [...new Set([model.value, other.value])].filter(Boolean);
}

function isAdapter({ edgelora }) {
  return edgelora?.kind === "adapter";
}

async function showChoice() {
  const ids = chosen();
  document.body.classList.toggle("comparing", ids.length > 1);
  const adapters = models.filter((each) => ids.includes(each.id) && isAdapter(each));
  const origins = await Promise.all(adapters.map(({ id }) => getModel(id).then(originOf).catch(problem)));
  if (String(ids) === String(chosen())) part("origins").replaceChildren(...origins);
}

// What went wrong before there is an answer to show it under; a missing key is asked for.
function report(error) {
  const form = part("key-form");
  const asks = error?.status === 401;
  // The same words again are not announced again.
  if (part("problem").textContent !== (error?.message ?? "")) {
    part("problem").replaceChildren(...(error ? [problem(error)] : []));
  }
  form.hidden = !asks;
  if (asks) part("key").focus();
}

function problem(error) {
  const isFull = error.code === "context_length_exceeded";
  const advice = isFull ? "\nA new conversation makes room, or a smaller “Longest answer” in the options." : "";
  const line = element("p.problem", error.message + advice);
  line.role = "alert";
  return line;
}

async function ask() {
  if (models.length === 0) return start();
  const question = message.value;
  if (running || question.trim() === "" || !optionsAreRight()) return;
  running = new AbortController();
  part("send").textContent = "Stop";
  part("empty").hidden = true;
  message.value = "";
  const answers = chosen().map(emptyAnswer);
  const columns = element("div.answers", ...answers.map(({ view }) => view));
  part("conversation").append(element("article.turn", element("p.question", question), columns));
  toTheEnd();
  await Promise.all(answers.map((answer) => fillAnswer(answer, question, running.signal)));
  running = null;
  part("send").textContent = "Send";
  part("clear").hidden = !part("conversation").hasChildNodes();
}

function optionsAreRight() {
  const wrong = [part("temperature"), part("max-tokens")].find((input) => !input.checkValidity());
  if (wrong) part("options").open = true;
  return wrong?.reportValidity() ?? true;
}

// Screen readers hear the text once it is whole, not piece by piece: it is busy until then.
function emptyAnswer(id) {
  const [name, text, meta] = [element("h2", id), element("p.text"), element("p.meta", "waiting")];
  text.ariaLive = meta.ariaLive = "polite";
  text.ariaBusy = "true";
  return { id, name, text, meta, view: element("section.answer", name, text, meta) };
}

async function fillAnswer({ id, name, text, meta, view }, question, signal) {
  const conversation = (conversations[id] ??= []);
  const asked = { role: "user", content: question };
  const body = {
    model: id,
    messages: [...conversation, asked],
    temperature: part("temperature").valueAsNumber,
    max_tokens: part("max-tokens").valueAsNumber,
  };
  const clock = { n_tokens: 0, first: 0, last: 0 };
  let reason = "stopped";
  try {
    for await (const chunk of streamAnswer(body, signal)) {
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        clock.last = performance.now();
        clock.first ||= clock.last;
        following(() => text.append(choice.delta.content));
        meta.textContent = "answering";
      }
      if (chunk.model !== id) name.textContent = `${id}: ${chunk.model}`;
      reason = choice?.finish_reason ?? reason;
      clock.n_tokens = chunk.usage?.completion_tokens ?? clock.n_tokens;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reason = "failed";
      view.append(problem(error));
      if (error.status === 401) report(error);
      message.value ||= question;
    }
  }
  const whole = text.textContent;
  if (whole && reason !== "failed") conversation.push(asked, { role: "assistant", content: whole });
  text.ariaBusy = "false";
  following(() => text.replaceChildren(whole));
  meta.textContent = summary(reason, body.max_tokens, clock);
}

// Pieces that came in one go say nothing of the speed.
function summary(reason, limit, { n_tokens, first, last }) {
  const parts = [reason === "length" ? `cut at ${limit} tokens` : (ENDS[reason] ?? reason)];
  const seconds = (last - first) / 1000;
  if (n_tokens) parts.push(`${n_tokens} token${n_tokens === 1 ? "" : "s"}`);
  if (n_tokens > 1 && seconds > 0.1) parts.push(`${((n_tokens - 1) / seconds).toFixed(1)} tokens/s`);
  return parts.join(" · ");
}

// Changes the page and keeps its end in view, unless the reader has scrolled away from it.
function following(change) {
  const atEnd = window.innerHeight + window.scrollY > document.body.scrollHeight - 80;
  change();
  if (atEnd) toTheEnd();
}

function toTheEnd() {
  window.scrollTo(0, document.body.scrollHeight);
}

function clear() {
  running?.abort();
  conversations = {};
  part("conversation").replaceChildren();
  part("empty").hidden = false;
  part("clear").hidden = true;
  message.focus();
}

part("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
part("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(part("key").value);
  message.focus();
  start();
});
part("clear").addEventListener("click", clear);
part("retry").addEventListener("click", start);
for (const select of [model, other]) select.addEventListener("change", showChoice);
start();
