"""What decides the result, besides the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

INSTRUCTIONS = (
    "Given a web search query, retrieve passages that answer the query.",
    "Given a question, retrieve passages that answer it.",
    "Retrieve text that is relevant to the query.",
    "Given a claim, find documents that support or refute it.",
    "Find the answer to a frequently asked question.",
)
"""Used now and then in place of the default, so that another instruction does no harm."""


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of ranking with a learning rate that rises, then falls along a cosine.

    Attributes:
        steps: batches.
        passages_per_group: candidates of each query: one positive and hard negatives.
        queries_per_group: queries that share these candidates.
        dense: weight of the dense signals at the start, and from the middle on.
        rate: highest learning rate.
        embeddings: share of that rate for the token embeddings, which start near where they should end.
        average: share of the weights' moving average that stays at each step; the average is what is measured and
            saved. 0 is the weights themselves.
        measured_every: steps between two measurements on the development split.
        muon: whether Muon changes the matrices, at AdamW's scale, instead of AdamW (torch 2.9 or newer).
        self_distilled: share of the coarse ratio's soft labels that is what the model itself says at the fine ratio.
        fine, coarse: compression ratios; every step sums the loss over one of each.
        soft: weights of the teacher's cosine, BM25's share and the label in the soft labels.
        lengths: tokens of a passage in a batch, drawn per batch.
    """

    steps: int
    passages_per_group: int
    queries_per_group: int
    dense: tuple[float, float]
    rate: float = 1.0e-3
    embeddings: float = 1.0
    average: float = 0.0
    measured_every: int = 500
    muon: bool = False
    self_distilled: float = 0.0
    fine: tuple[int, ...] = (1, 2, 4)
    coarse: tuple[int, ...] = (4, 8, 16, 32)
    soft: tuple[float, float, float] = (10.0, 10.0, 4.0)
    lengths: tuple[int, ...] = (128, 128, 192, 192, 256)


_ROUNDS = (
    Round(1_500, 8, 4, (1.0, 0.15)),
    Round(1_100, 12, 4, (0.15, 0.1), 6.0e-4, 0.15),
    Round(
        1_000,
        12,
        4,
        (0.1, 0.05),
        6.0e-4,
        0.3,
        self_distilled=0.4,
        soft=(16.0, 10.0, 4.0),
        lengths=(128, 192, 192, 256, 256, 384),
    ),
    Round(
        1_600,
        12,
        4,
        (0.1, 0.05),
        5.0e-4,
        0.2,
        average=0.998,
        measured_every=200,
        muon=True,
        self_distilled=0.4,
        fine=(1, 2, 4, 4),
        coarse=(8, 16, 16, 32, 32),
        soft=(16.0, 10.0, 4.0),
        lengths=(128, 192, 256, 256, 384, 480),
    ),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, besides the data. The defaults made the bundled checkpoint.

    Attributes:
        seed: of weights and batches.
        pieces: word pieces in the vocabulary.
        encoder_layers, decoder_layers: depth.
        queries_per_source: queries used of each set at most.
        longest: tokens of a passage that are kept.
        lengths: tokens of a passage in a batch of the encoder's own stage, drawn per batch.
        batch_tokens: passage tokens per batch.
        encoder_steps: batches in which the encoder alone learns to read as the teacher does.
        encoder_rate: highest learning rate of those.
        rounds: passes of ranking, each from the weights with the best development score so far.
        measured_ratios: compression ratios of the development split's measurements, whose mean counts.
        answer: weight of the binary cross-entropy of `P(yes)`.
    """

    seed: int = 0
    pieces: int = 18_000
    encoder_layers: int = 3
    decoder_layers: int = 3
    queries_per_source: int = 15_000
    longest: int = 480
    lengths: tuple[int, ...] = (128, 128, 192, 192)
    batch_tokens: int = 8_192
    encoder_steps: int = 400
    encoder_rate: float = 1.0e-3
    rounds: tuple[Round, ...] = _ROUNDS
    measured_ratios: tuple[int, ...] = (4, 16, 32)
    answer: float = 0.15

    def shortened(self, share: float) -> Recipe:
        """The same recipe with that share of the steps, to try it out."""
        return replace(
            self,
            encoder_steps=max(1, round(self.encoder_steps * share)),
            rounds=tuple(replace(one, steps=max(1, round(one.steps * share))) for one in self.rounds),
        )
