// Ranks once through a client in JavaScript: node rerank.mjs CLIENT URL KEY, with {"query", "documents", "top_n"} as JSON
// on the standard input. It prints [[index, score], ...], or, with exit status 1, the error as the client's user sees it.
import { readFileSync } from "node:fs";

import { CohereRerank } from "@langchain/cohere";
import { Document } from "@langchain/core/documents";
import { CohereClient, CohereClientV2 } from "cohere-ai";
import { CohereClient as Cohere7Client } from "cohere-ai-7";

const model = "kalm";

async function ask(Client, url, token, { query, documents, top_n }) {
  const { results } = await new Client({ environment: url, token }).rerank({ model, query, documents, topN: top_n });
  return results.map((result) => [result.index, result.relevanceScore]);
}

const clients = {
  v1: (...asked) => ask(CohereClient, ...asked),
  v2: (...asked) => ask(CohereClientV2, ...asked),
  async langchain(url, token, { query, documents, top_n }) {
    // Without `client` it asks Cohere. It stands on version 7 of cohere-ai.
    const client = new Cohere7Client({ environment: url, token });
    const reranker = new CohereRerank({ client, model, topN: top_n });
    const found = await reranker.compressDocuments(
      documents.map((pageContent, index) => new Document({ pageContent, metadata: { index } })),
      query,
    );
    return found.map(({ metadata }) => [metadata.index, metadata.relevanceScore]);
  },
};

const [name, url, key] = process.argv.slice(2);
try {
  console.log(JSON.stringify(await clients[name](url, key, JSON.parse(readFileSync(0, "utf8")))));
} catch (error) {
  console.log(`${error.name}: ${error.message}`);
  process.exitCode = 1;
}
