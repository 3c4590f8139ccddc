"""Joint cross-encoders and a causal reranker with random weights, each in the runtimes that people use on its device.

A joint model reads query and passage together, so it reads every passage again for every query. Pairs are sorted by
length and run in small batches, so that hardly anything is padding. Tokenising is not timed.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from report import Spent, counted, spent_on

from kalm_rag.utils.machine import version_of

MOST_TOKENS = 512
"""What a peer reads of a pair at most."""

_LONG = 5.0
"""Seconds from which a trial is not made twice."""

_CAUSAL_EXTRA = 75
"""Tokens that Qwen3-Reranker's prompt puts around a pair: system prompt, instruction, and the start of the answer."""


@dataclass(frozen=True)
class Peer:
    """A geometry.

    Attributes:
        name: as the tables show it.
        family: of `transformers`: `Bert`, `XLMRoberta`, `ModernBert` or `Qwen3`.
        rows: of its vocabulary.
        sizes: of its configuration.
    """

    name: str
    family: str
    rows: int
    sizes: dict[str, int] = field(hash=False)

    @property
    def causal(self) -> bool:
        """Whether it is a language model that answers yes or no."""
        return self.family == "Qwen3"


def _sizes(hidden: int, layers: int, heads: int, intermediate: int, **others: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        **others,
    }


PEERS = (
    Peer("TinyBERT-L2 4M", "Bert", 30_522, _sizes(128, 2, 2, 512)),
    Peer("Ettin 17M", "ModernBert", 50_368, _sizes(256, 7, 4, 384)),
    Peer("MiniLM-L6 22M", "Bert", 30_522, _sizes(384, 6, 12, 1536)),
    Peer("Ettin 32M", "ModernBert", 50_368, _sizes(384, 10, 6, 576)),
    Peer("MiniLM-L12 33M", "Bert", 30_522, _sizes(384, 12, 12, 1536)),
    Peer("XLM-R-base 0.28B", "XLMRoberta", 250_002, _sizes(768, 12, 12, 3072)),
    Peer("Qwen3-Reranker 0.6B", "Qwen3", 151_669, _sizes(1024, 28, 16, 3072, num_key_value_heads=8, head_dim=128)),
)
"""Smallest first."""


def read_lengths(peer: Peer, query: int, passages: Sequence[int]) -> list[int]:
    """Tokens that a peer reads of each pair, of a query and passages of so many tokens."""
    around = _CAUSAL_EXTRA if peer.causal else 3
    most = 8192 if peer.causal else MOST_TOKENS
    return [min(most, query + tokens + around) for tokens in passages]


Run = Callable[[Any, Any], Any]
"""Runs a batch: token ids and mask, integers of shape (rows, tokens)."""


class Joint:
    """One peer in all of its runtimes.

    Args:
        peer: the geometry.
        folder: where exported graphs go.
        device: of torch.
        small: one layer of few rows, to check a script.
    """

    def __init__(self, peer: Peer, folder: Path, *, device: str = "cpu", small: bool = False) -> None:
        self.peer = peer
        self.device = device
        self._folder = folder
        self._small = small
        self._graph: Path | None = None

    def runtimes(self) -> Iterator[tuple[str, Callable[[], Run]]]:
        """Yield the name of each runtime, and what prepares it; preparing raises what is wrong."""
        import torch

        dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if self.device != "cpu" else [])
        for dtype in dtypes:
            yield f"torch {str(dtype).removeprefix('torch.')}", lambda dtype=dtype: self._torch(dtype)
        if self.device != "cpu" or self.peer.causal:
            return  # the graph of a large language model is more than one ONNX file holds
        yield "ONNX Runtime float32", self._onnx
        yield "ONNX Runtime int8", lambda: self._onnx(int8=True)
        for hint in ("f32", "bf16"):
            yield f"OpenVINO {hint}", lambda hint=hint: self._openvino(hint)

    def model(self, dtype: Any) -> Any:
        """The network with random weights."""
        import torch
        import transformers

        sizes = {**self.peer.sizes, **({"num_hidden_layers": 1} if self._small else {})}
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
        if self.peer.family == "ModernBert":
            ids |= {"cls_token_id": 2, "sep_token_id": 1}
        most = {"ModernBert": 7999, "Qwen3": 40_960, "XLMRoberta": MOST_TOKENS + 2}.get(self.peer.family, MOST_TOKENS)
        kind = "ForCausalLM" if self.peer.causal else "ForSequenceClassification"
        labels = {} if self.peer.causal else {"num_labels": 1}
        config = getattr(transformers, f"{self.peer.family}Config")(
            vocab_size=self._rows, max_position_embeddings=most, **sizes, **ids, **labels
        )
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.peer.family}{kind}")(config)
        torch.random.set_rng_state(state)
        return model.to(dtype).to(self.device).eval()

    @property
    def _rows(self) -> int:
        return 2048 if self._small else self.peer.rows

    def batches(self, lengths: Sequence[int], rows: int) -> list[tuple[Any, Any]]:
        """Token ids and masks of pairs of these lengths, sorted by length, `rows` at once; ids are random."""
        import numpy as np

        generator = np.random.default_rng(0)
        ordered = sorted(lengths, reverse=True)
        found = []
        for start in range(0, len(ordered), rows):
            part = ordered[start : start + rows]
            mask = (np.arange(part[0])[None, :] < np.array(part)[:, None]).astype(np.int64)
            found.append((generator.integers(5, self._rows, mask.shape, dtype=np.int64) * mask, mask))
        return found

    def _torch(self, dtype: Any) -> Run:
        import torch

        model = self.model(dtype)

        def run(ids: Any, mask: Any) -> Any:
            given = {"input_ids": torch.from_numpy(ids).to(self.device)}
            if not mask.all():
                given["attention_mask"] = torch.from_numpy(mask).to(self.device)
            with torch.inference_mode():
                if self.peer.causal:
                    return model(**given, use_cache=False, logits_to_keep=1).logits.float().cpu().numpy()
                return model(**given).logits.float().cpu().numpy()

        return run

    def _exported(self) -> Path:
        import torch

        _need("onnx")
        if self._graph is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            model = _by_position(self.model(torch.float32))
            ids, mask = map(torch.from_numpy, self.batches([24, 16], 2)[0])
            names, axes = ["input_ids", "attention_mask"], {0: "rows", 1: "tokens"}
            file = self._folder / "float32.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tracing, and that a newer exporter exists
                torch.onnx.export(
                    model,
                    (ids, mask),
                    str(file),
                    input_names=names,
                    output_names=["logits"],
                    dynamic_axes=dict.fromkeys(names, axes),
                    dynamo=False,
                )
            self._graph = file
        return self._graph

    def _onnx(self, *, int8: bool = False) -> Run:
        import torch

        _need("onnxruntime")
        import onnxruntime

        file = self._exported()
        onnxruntime.set_default_logger_severity(3)
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            file, source = file.with_name("int8.onnx"), file
            logging.disable(logging.WARNING)  # that the graph could be simplified first
            try:
                quantize_dynamic(source, file, weight_type=QuantType.QInt8)
            finally:
                logging.disable(logging.NOTSET)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    def _openvino(self, hint: str) -> Run:
        import torch

        _need("openvino")
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.Core().compile_model(str(self._exported()), "CPU", options).create_infer_request()
        return lambda ids, mask: next(iter(request.infer([ids, mask]).values()))


def _by_position(model: Any) -> Any:
    """A module that takes ids and mask by position and returns only logits, as exporting needs it."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask).logits

    return Module().eval()


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        msg = f"{package} is not installed (pip install {package})"
        raise ModuleNotFoundError(msg)


def time_of(run: Run, batches: Sequence[tuple[Any, Any]]) -> Spent:
    """Time a query whose pairs are in these batches."""

    def all_of_them() -> None:
        for ids, mask in batches:
            run(ids, mask)

    return spent_on(all_of_them)


def measure_peer(
    peer: Peer,
    queries: Sequence[tuple[int, Sequence[int]]],
    folder: Path,
    *,
    device: str = "cpu",
    small: bool = False,
    budget: float = 60.0,
) -> dict[str, Any]:
    """Find a peer's fastest runtime and batch size, then measure queries on it.

    Runtimes are compared on a quarter of the first query's pairs, the better of two times unless the first is long;
    batch sizes are compared in the fastest runtime.

    Args:
        peer: the geometry.
        queries: the tokens of each query, and of its passages.
        folder: where exported graphs go.
        device: of torch.
        small: as in `Joint`.
        budget: seconds after which no further query is begun; one is always measured.

    Returns:
        The peer's name; for each runtime the seconds of a pair and how far its logits are from torch's in float32, or
        a reason why it does not run; the fastest one, its rows of a batch, its times of each query, their median, and
        the mean tokens of a pair. `seconds` and `p50` are of the time that `counted` names.
    """
    joint, kind = Joint(peer, folder, device=device, small=small), counted(device)
    lengths = [read_lengths(peer, *query) for query in queries]
    trial = joint.batches(sorted(lengths[0])[::4], 1 if peer.causal and device == "cpu" else 8)
    pairs = sum(len(ids) for ids, _ in trial)
    tried: dict[str, Any] = {}
    expected = None
    for name, prepare in joint.runtimes():
        run = None
        try:
            run = prepare()
            logits = run(*trial[-1])  # the first run allocates and compiles
            expected = logits if expected is None else expected
            taken = getattr(time_of(run, trial), kind)
            if taken < _LONG:
                taken = min(taken, getattr(time_of(run, trial), kind))
            tried[name] = {"seconds": taken / pairs, "difference": float(abs(logits - expected).max())}
        except Exception as error:  # noqa: BLE001 - a runtime that does not run is part of the result
            tried[name] = {"seconds": None, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        run = None
        gc.collect()
    tokens = statistics.mean(token for query in lengths for token in query)
    result = {"peer": peer.name, "runtimes": tried, "mean_tokens": tokens}
    running = {name: item["seconds"] for name, item in tried.items() if item["seconds"] is not None}
    if not running:
        return {**result, "fastest": None, "samples": [], "p50": None}
    name = min(running, key=running.__getitem__)
    run = dict(joint.runtimes())[name]()
    sizes = (8, 32) if device != "cpu" else (1,) if peer.causal else (4, 8, 16)
    by_size = {rows: joint.batches(lengths[0], rows) for rows in sizes}
    run(*by_size[sizes[0]][0])
    rows = min(sizes, key=lambda rows: getattr(time_of(run, by_size[rows]), kind)) if len(sizes) > 1 else sizes[0]
    samples: list[Spent] = []
    start = time.perf_counter()
    for query in lengths:
        samples.append(time_of(run, joint.batches(query, rows)))
        if time.perf_counter() - start > budget:
            break
    p50 = statistics.median(getattr(sample, kind) for sample in samples)
    return {**result, "fastest": name, "rows": rows, "samples": [asdict(sample) for sample in samples], "p50": p50}


def runtime_versions() -> dict[str, str]:
    """Versions of the runtimes that are installed."""
    found = {name: version_of(name) for name in ("onnx", "onnxruntime", "openvino")}
    return {name: version for name, version in found.items() if version is not None}


def missing(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that say which runtimes did not run, and why, each reason once."""
    found = {
        f"{name}: {item['reason']}"
        for result in results
        for name, item in result["runtimes"].items()
        if item["seconds"] is None
    }
    return sorted(found)
