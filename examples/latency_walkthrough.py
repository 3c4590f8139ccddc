# %% [markdown]
# # Where the time goes
# A walk-through in cells, for an editor that shows them or for plain Python: ten queries over the same
# passages, and a plot of what each one took.

# %%
import time

from common import CACHE, PASSAGES, QUESTIONS, model

from kalm_rag import KaLMReranker

reranker = KaLMReranker(model(), cache=CACHE / "passages").load()

# %% [markdown]
# The first query encodes the passages and prefills them. The others run their own tokens alone.

# %%
milliseconds = []
for question in [*QUESTIONS, *(f"{question} Please explain." for question in QUESTIONS)]:
    start = time.perf_counter()
    hits = reranker.rank(question, PASSAGES)
    milliseconds.append(1000 * (time.perf_counter() - start))
    print(f"{milliseconds[-1]:7.0f} ms  {question[:60]}")

# %% [markdown]
# The best passages of the last query, and what happened at each level.

# %%
for hit in hits[:3]:
    print(f"{hit.score:.4f}  {hit.document[:60]}")
print(reranker.prefill_stats().counters)
print(reranker.cache.stats().store.counters)

# %%
try:
    import matplotlib as mpl
except ImportError:
    print("pip install matplotlib, for the plot")
else:
    mpl.use("agg")
    import matplotlib.pyplot as plt

    plt.bar(range(1, len(milliseconds) + 1), milliseconds)
    plt.xlabel("query")
    plt.ylabel("milliseconds")
    plt.savefig(CACHE / "latency.png")
    print(f"plot: {CACHE / 'latency.png'}")
