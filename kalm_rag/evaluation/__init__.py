"""Measures how well a reranker orders what a first stage found, and what it costs: the library behind `kalm-rag eval`.

Needs the extra `eval`. Nothing here is imported by the scorer.
"""

from kalm_rag.evaluation.candidates import Candidates, bm25_candidates, run_candidates
from kalm_rag.evaluation.experiment import Experiment, System, SystemResult, evaluate
from kalm_rag.evaluation.metrics import Metrics
from kalm_rag.evaluation.thresholds import ThresholdStudy, calibrate, scope_of, study_thresholds
from kalm_rag.evaluation.trec import read_run, write_run

__all__ = [
    "Candidates",
    "Experiment",
    "Metrics",
    "System",
    "SystemResult",
    "ThresholdStudy",
    "bm25_candidates",
    "calibrate",
    "evaluate",
    "read_run",
    "run_candidates",
    "scope_of",
    "study_thresholds",
    "write_run",
]
