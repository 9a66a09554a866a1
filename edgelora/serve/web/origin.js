// How an adapter was made, from what its file records: facts, and a bar for each source.

import { element } from "./dom.js";

const TITLES = {
  description: "About",
  operator: "Chosen by",
  distance: "Distance",
  method: "Combined by",
  rank: "Rank",
  scale: "Scale",
  error: "Merge error",
  seed: "Seed",
  budget_tokens: "Budget in tokens",
  template: "Template",
  base: "Base",
  source: "Data",
  licence: "Licence",
  tool: "Made by",
  file: "File",
};

// Takes an answer of GET /v1/models/{id}.
export function originOf({ id, edgelora }) {
  const { provenance, problem } = edgelora;
  const sources = [provenance?.sources ?? []].flat().filter((source) => source instanceof Object);
  const end = sources.length
    ? barsOf(sources, provenance.distances ?? {})
    : element("p.note", problem ?? "It is not combined from others.");
  return element("details", element("summary", `How ${id} was made`), factsOf(edgelora), end);
}

function factsOf({ ranks, provenance, ...facts }) {
  const rank = ranks && [...new Set(ranks)].join("–");
  const own = { ...provenance, ...facts, rank };
  const list = element("dl.facts");
  for (const [key, title] of Object.entries(TITLES)) {
    const value = own[key];
    if (value === undefined || value === null || value === "") continue;
    list.append(element("dt", title), element("dd", key === "error" ? `${short(100 * value)} %` : short(value)));
  }
  return list;
}

// Largest first; bars of one scale with a common zero, minus to the left.
function barsOf(sources, distances) {
  const weights = sources.map((source) => source.coefficient).filter(Number.isFinite);
  const low = Math.min(0, ...weights);
  const width = Math.max(0, ...weights) - low || 1;
  const size = (source) => Math.abs(source.coefficient ?? 0);
  const rows = [...sources].sort((a, b) => size(b) - size(a)).map((source) => {
    const weight = source.coefficient;
    const value = element("span.value", Number.isFinite(weight) ? signed(weight) : "one for each tensor");
    const row = element("li", element("span", ...breakable(source.name)), value);
    if (Number.isFinite(weight)) row.append(bar(weight, (weight) => (100 * (weight - low)) / width));
    row.append(about(source, distances[source.name]));
    return row;
  });
  const list = element("ul.bars", ...rows);
  list.setAttribute("aria-label", "Sources and their coefficients");
  return list;
}

function bar(weight, place) {
  const svg = drawn("svg", { "aria-hidden": "true" });
  const [from, to] = [place(Math.min(0, weight)), place(Math.max(0, weight))];
  svg.append(
    drawn("rect", { x: `${from}%`, width: `${to - from}%`, height: "100%", class: weight < 0 ? "minus" : "plus" }),
    drawn("line", { x1: `${place(0)}%`, x2: `${place(0)}%`, y2: "100%" }),
  );
  return svg;
}

function about(source, distance) {
  const parts = [
    source.source && `data ${source.source}`,
    source.licence && `licence ${source.licence}`,
    Number.isFinite(distance) && `distance ${short(distance)}`,
  ];
  return element("span.source", parts.filter(Boolean).join(" · "));
}

function drawn(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// task_names_like_this may break after each underscore.
function breakable(name) {
  return String(name).split(/(?<=_)/).flatMap((piece) => [piece, element("wbr")]);
}

const signed = (number) => (number < 0 ? "−" : "+") + Math.abs(number).toFixed(3);

const short = (value) => (Number.isFinite(value) && !Number.isInteger(value) ? Number(value.toPrecision(3)) : value);
