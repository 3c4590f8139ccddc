// What the page sends, and the same as code. The key itself is never part of the code.

export const PATH = "v2/rerank";

/** Passages of a text, which empty lines separate. */
export function passagesOf(text) {
  return text.split(/\n[^\S\n]*\n/).map((part) => part.trim()).filter((part) => part !== "");
}

/** The body of a request; options that are empty are left out. */
export function bodyOf(query, passages, options, ratio) {
  const body = { query, documents: passages, ratio, details: true, return_source: true };
  if (options.instruction.trim() !== "") body.instruction = options.instruction;
  if (options.budget !== "") body.budget_ms = Number(options.budget);
  if (options.long !== "") body.long_passages = options.long;
  return body;
}

function asPython(value, indent = "") {
  if (value === true) return "True";
  if (value === null || value === false) return value === null ? "None" : "False";
  if (typeof value !== "object") return JSON.stringify(value); // a string of JSON is one of Python
  const deeper = `${indent}    `;
  const isList = Array.isArray(value);
  const parts = Object.entries(value).map(
    ([name, own]) => `${deeper}${isList ? "" : `${JSON.stringify(name)}: `}${asPython(own, deeper)},\n`,
  );
  return isList ? `[\n${parts.join("")}${indent}]` : `{\n${parts.join("")}${indent}}`;
}

/** A request in a language: `curl` (for a POSIX shell), `python` or `javascript`. */
export function codeOf(language, address, body, needsKey) {
  if (language === "python") {
    const header = needsKey ? ', "Authorization": f"Bearer {os.environ[\'KALM_RAG_API_KEY\']}"' : "";
    return `import json
${needsKey ? "import os\n" : ""}import urllib.request

body = ${asPython(body)}
request = urllib.request.Request(
    ${JSON.stringify(address)},
    data=json.dumps(body).encode(),
    headers={"Content-Type": "application/json"${header}},
)
with urllib.request.urlopen(request) as response:
    answer = json.load(response)
for result in answer["results"]:
    print(result["index"], result["relevance_score"], result["margin"])
`;
  }
  if (language === "javascript") {
    const header = needsKey ? ", Authorization: `Bearer ${process.env.KALM_RAG_API_KEY}`" : "";
    return `const body = ${JSON.stringify(body, null, 2)};
const response = await fetch(${JSON.stringify(address)}, {
  method: "POST",
  headers: { "Content-Type": "application/json"${header} },
  body: JSON.stringify(body),
});
if (!response.ok) throw new Error(\`\${response.status}: \${await response.text()}\`);
const answer = await response.json();
for (const result of answer.results) {
  console.log(result.index, result.relevance_score, result.margin);
}
`;
  }
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const header = needsKey ? ' \\\n  -H "Authorization: Bearer $KALM_RAG_API_KEY"' : "";
  return `curl ${quoted(address)} \\
  -H 'Content-Type: application/json'${header} \\
  -d ${quoted(JSON.stringify(body, null, 2))}
`;
}
