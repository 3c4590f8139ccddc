// The form: reads it, asks the server, and says what came of it.

import { PATH, bodyOf, codeOf, passagesOf } from "./requests.js";
import { milliseconds, show } from "./results.js";

const RATIOS = [1, 2, 4, 8, 16, 32];
const KEY = "kalm-rag-key";
const SOME = 20;
const at = (id) => document.getElementById(id);
const plural = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;

let needsKey = false;
let running = null; // the AbortController of the ranking that runs
let afterKey = null; // what to do again once there is a key
let demo = null;

class KeyError extends Error {}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // storage is switched off: the page asks again after a reload
  }
}
let key = storedKey();

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    needsKey = true;
    throw new KeyError();
  }
  const text = await response.text();
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // A proxy in between answers what it likes; the status is told below.
  }
  if (!response.ok || answer === null) {
    const wait = response.headers.get("retry-after");
    const message = answer?.message ?? "the answer is not JSON";
    throw new Error(`${response.status}: ${message}${wait === null ? "" : ` (try again in ${wait} s)`}`);
  }
  return answer;
}

function askForKey(again) {
  afterKey = again;
  const wasRefused = key !== null;
  forget();
  at("key-form").hidden = false;
  at("key-error").hidden = !wasRefused;
  at("key-error").textContent = wasRefused ? "The server does not know this key. Enter another one." : "";
  at("key").value = "";
  at("key").focus();
}

function forget() {
  key = null;
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // There is nothing to remove.
  }
}

function takeKey(event) {
  event.preventDefault();
  key = at("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    key = null;
    at("key-error").hidden = false;
    at("key-error").textContent = "A key has letters, digits and signs of ASCII only, and no spaces.";
    at("key").focus();
    return;
  }
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // It holds until the page is loaded again.
  }
  at("key-form").hidden = true;
  at("key").value = "";
  at("query").focus();
  const again = afterKey;
  afterKey = null;
  again?.();
}

function fail(text) {
  at("error").textContent = text;
  at("error").hidden = text === "";
}

async function readInfo() {
  try {
    const info = await ask("info");
    const read = `${info.model} on ${info.device} (${info.dtype}), ratio ${info.ratio}, ${info.max_length} tokens a passage`;
    at("about").textContent = `Ranks passages by how well they answer a query. Model: ${read}. Version ${info.version}.`;
    at("instruction").placeholder = info.instruction;
    if (!RATIOS.some((ratio) => at(`ratio-${ratio}`).dataset.touched)) choose(info.ratio);
    showCode();
  } catch (error) {
    if (error instanceof KeyError) askForKey(readInfo);
    else fail(`The server does not say what it is. ${error.message}`);
  }
}

function choose(own) {
  for (const ratio of RATIOS) at(`ratio-${ratio}`).checked = ratio === own;
}

const chosen = () => RATIOS.filter((ratio) => at(`ratio-${ratio}`).checked);
const options = () => ({
  instruction: at("instruction").value,
  budget: at("budget").value,
  long: at("long").value,
});

async function rank(event) {
  event?.preventDefault();
  const query = at("query").value;
  const passages = passagesOf(at("passages").value);
  const ratios = chosen();
  fail("");
  if (passages.length === 0) {
    fail("There is no passage: write some, or load the demo's.");
    at("passages").focus();
    return;
  }
  if (ratios.length === 0) {
    fail("No ratio is chosen: choose at least one.");
    at(`ratio-${RATIOS[0]}`).focus();
    return;
  }
  running?.abort();
  const own = new AbortController();
  running = own;
  at("stop").hidden = false;
  const runs = [];
  try {
    for (const ratio of ratios) {
      at("status").textContent = `Ranking ${plural(passages.length, "passage")} at ratio ${ratio} …`;
      const began = performance.now();
      const answer = await ask(PATH, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(bodyOf(query, passages, options(), ratio)),
        signal: own.signal,
      });
      runs.push({ ratio, answer, milliseconds: performance.now() - began });
    }
  } catch (error) {
    if (running !== own) return; // a later ranking tells
    at("status").textContent = own.signal.aborted ? "Stopped." : "";
    if (error instanceof KeyError) askForKey(rank);
    else if (!own.signal.aborted) fail(`The server did not rank. ${error.message}`);
  }
  if (running !== own) return;
  running = null;
  if (document.activeElement === at("stop")) at("rank").focus();
  at("stop").hidden = true;
  if (runs.length > 0) {
    show(at("summary"), at("ranking"), passages, runs);
    at("results").hidden = false;
  }
  if (runs.length === ratios.length) {
    const all = runs.reduce((sum, run) => sum + run.milliseconds, 0);
    const best = runs[0].answer.results[0];
    const where = ratios.length > 1 ? ` at ${ratios.length} ratios` : "";
    const told = best === undefined ? "no passage has a score" : `passage ${best.index + 1} is best`;
    at("status").textContent = `Ranked ${plural(passages.length, "passage")}${where} in ${milliseconds(all)}: ${told}.`;
  }
}

async function loadDemo(count) {
  fail("");
  try {
    demo ??= await ask("assets/demo.json");
  } catch (error) {
    fail(`The demo corpus did not come. ${error.message}`);
    return;
  }
  const passages = demo.passages.slice(0, count);
  at("passages").value = passages.join("\n\n");
  const queries = demo.queries.slice(0, passages.length); // each of these has its answer among the passages
  if (!queries.includes(at("query").value)) [at("query").value] = queries;
  at("demo-queries").replaceChildren(
    ...queries.map((query) => {
      const option = document.createElement("option");
      option.value = query;
      return option;
    }),
  );
  at("status").textContent = `Loaded ${passages.length} passages; the query field suggests ${queries.length} queries.`;
  showCode();
}

function showCode() {
  const passages = passagesOf(at("passages").value);
  const count = passages.length;
  at("passages-count").textContent = count === 0 ? "" : `${plural(count, "passage")}.`;
  const ratios = chosen();
  const body = bodyOf(at("query").value, passages, options(), ratios[0] ?? 1);
  const language = document.querySelector("input[name=language]:checked").value;
  at("code").textContent = codeOf(language, new URL(PATH, document.baseURI).href, body, needsKey);
  const notes = [];
  if (ratios.length > 1) notes.push(`At ratio ${ratios[0]}, the first of those chosen.`);
  if (needsKey) notes.push("The key is read from the environment variable KALM_RAG_API_KEY.");
  at("code-note").textContent = notes.join(" ");
  at("copied").textContent = "";
}

async function copy() {
  const text = at("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
    at("copied").textContent = "Copied.";
  } catch {
    // Browsers give the clipboard to https and localhost only: select the code, so that Ctrl+C copies it.
    getSelection().selectAllChildren(at("code"));
    at("code").focus();
    at("copied").textContent = "Selected: press Ctrl+C to copy.";
  }
}

for (const ratio of RATIOS) {
  const label = document.createElement("label");
  label.className = "choice";
  const box = document.createElement("input");
  box.type = "checkbox";
  box.id = `ratio-${ratio}`;
  box.addEventListener("change", () => {
    box.dataset.touched = "yes";
  });
  label.append(box, String(ratio));
  at("ratio-choices").append(label);
}
choose(4);
at("key-form").addEventListener("submit", takeKey);
at("rank-form").addEventListener("submit", rank);
at("rank-form").addEventListener("input", showCode);
at("stop").addEventListener("click", () => running?.abort());
at("demo-some").addEventListener("click", () => loadDemo(SOME));
at("demo-all").addEventListener("click", () => loadDemo(Infinity));
at("copy").addEventListener("click", copy);
for (const choice of document.querySelectorAll("input[name=language]")) choice.addEventListener("change", showCode);
showCode();
readInfo();
