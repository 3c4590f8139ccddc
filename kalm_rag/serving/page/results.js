// Shows rankings. Texts of passages and servers go through textContent only, so that they never become markup.

const SOURCES = {
  remembered: "score known",
  memory: "memory",
  store: "disk",
  remote: "shared tier",
  encoded: "encoded now",
};
const LONG = 600; // characters of a passage that are shown at first

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className !== undefined) made.className = className;
  return made;
}

function list(facts) {
  const made = element("dl");
  for (const [name, value] of facts) made.append(element("dt", name), element("dd", value));
  return made;
}

export const milliseconds = (number) => `${number < 100 ? number.toFixed(1) : Math.round(number)} ms`;

/** Where time went and where passages came from, at one ratio. */
function summaryOf(run, passages) {
  const box = element("div", undefined, "box");
  box.append(element("h3", `Ratio ${run.ratio}`));
  const facts = [["In this browser", milliseconds(run.milliseconds)]];
  const call = run.answer.calls?.[0];
  if (call) {
    facts.push(["On the server", milliseconds(call.timings.total * 1000)]);
    for (const name of ["queue", "read", "encode", "prefill", "score"]) {
      if (call.timings[name] >= 5e-5) facts.push([`· ${name}`, milliseconds(call.timings[name] * 1000)]);
    }
  }
  const counts = new Map();
  for (const { source } of run.answer.results) counts.set(source, (counts.get(source) ?? 0) + 1);
  for (const [name, shown] of Object.entries(SOURCES)) {
    if (counts.has(name)) facts.push([`Passages: ${shown}`, String(counts.get(name))]);
  }
  if (run.answer.unscored) facts.push(["Passages: not scored in time", String(run.answer.unscored.length)]);
  const below = passages.length - run.answer.results.length - run.left.size;
  if (below > 0) facts.push(["Passages: below the threshold", String(below)]);
  facts.push(["Tokens", String(run.answer.usage.total_tokens)]);
  box.append(list(facts));
  return box;
}

/** How one passage did at one ratio; `first` is its place at the first ratio. */
function boxOf(run, index, first) {
  const box = element("div", undefined, "box");
  const place = run.places.get(index);
  const title = element("h3", `Ratio ${run.ratio}`);
  box.append(title);
  if (place === undefined) {
    box.append(element("p", run.left.has(index) ? "Not scored: the budget ended." : "Below the threshold.", "note"));
    return box;
  }
  title.append(`: place ${place + 1}`);
  if (first !== undefined && first !== place) {
    title.append(place < first ? ` (up ${first - place})` : ` (down ${place - first})`);
  }
  const result = run.answer.results[place];
  const meter = element("meter");
  meter.min = 0;
  meter.max = 1;
  meter.value = result.probability;
  meter.setAttribute("aria-hidden", "true"); // the number follows
  const facts = [
    ["P(yes)", result.probability.toFixed(4)],
    ["Margin", result.margin.toFixed(2)],
    ["From", SOURCES[result.source] ?? "not told"],
  ];
  box.append(meter, list(facts));
  for (const [name, shown] of [
    ["passage_truncated", "Passage truncated: its end was not read."],
    ["query_truncated", "Query truncated: its end was not read."],
    ["passage_repaired", "Half a character was read as U+FFFD."],
  ]) {
    if (result[name]) box.append(element("p", shown, "note flag"));
  }
  if (result.exact === false) box.append(element("p", "Approximate: of the first pass.", "note"));
  return box;
}

function textOf(text, span, name) {
  const shown = element("p", undefined, "text");
  if (span) {
    // The server counts characters as Python does, by code point.
    const points = Array.from(text);
    const part = (start, end) => points.slice(start, end).join("");
    const best = element("mark", part(...span));
    best.title = "the best window";
    shown.append(part(0, span[0]), best, part(span[1]));
  } else {
    shown.textContent = text;
  }
  if (text.length <= LONG) return [shown];
  shown.classList.add("short");
  const button = element("button", "Show all", "second more");
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-label", `Show all of ${name}`);
  button.addEventListener("click", () => {
    const isShort = shown.classList.toggle("short");
    button.textContent = isShort ? "Show all" : "Show less";
    button.setAttribute("aria-label", `${button.textContent} of ${name}`);
    button.setAttribute("aria-expanded", String(!isShort));
  });
  return [shown, button];
}

/** Show runs of the same query and passages at several ratios, in the order of the first. */
export function show(summary, ranking, passages, runs) {
  for (const run of runs) {
    run.places = new Map(run.answer.results.map((result, place) => [result.index, place]));
    run.left = new Set((run.answer.unscored ?? []).map((one) => one.index));
  }
  summary.replaceChildren(...runs.map((run) => summaryOf(run, passages)));
  const order = new Set(runs.flatMap((run) => [...run.places.keys()]));
  for (const run of runs) for (const index of run.left) order.add(index);
  ranking.replaceChildren(
    ...[...order].map((index) => {
      const item = element("li");
      const [main] = runs;
      const place = main.places.get(index);
      const heading = element("p", place === undefined ? "No place " : `${place + 1} `, "place");
      heading.append(element("small", `passage ${index + 1} of ${passages.length}`));
      const boxes = element("div", undefined, "grid");
      boxes.append(...runs.map((run) => boxOf(run, index, run === main ? undefined : place)));
      const span = place === undefined ? undefined : main.answer.results[place].span;
      item.append(heading, ...textOf(passages[index], span, `passage ${index + 1}`), boxes);
      return item;
    }),
  );
}
