"""Measures how well a reranker orders what a first stage found, and what it costs: the library behind `kalm-rag eval`.

Needs the extra `eval`. Nothing here is imported by the scorer.
"""

from kalm_rag.evaluation.agreement import Agreement, Pair, compare_runs, worth_judging, write_pairs
from kalm_rag.evaluation.candidates import Candidates, bm25_candidates, run_candidates
from kalm_rag.evaluation.compared import ComparedRun, read_compared
from kalm_rag.evaluation.entries import Entry
from kalm_rag.evaluation.experiment import Experiment, SystemResult, evaluate
from kalm_rag.evaluation.metrics import Metrics
from kalm_rag.evaluation.systems import System
from kalm_rag.evaluation.thresholds import ThresholdStudy, calibrate, scope_of, study_thresholds
from kalm_rag.evaluation.trec import read_run, write_run

__all__ = [
    "Agreement",
    "Candidates",
    "ComparedRun",
    "Entry",
    "Experiment",
    "Metrics",
    "Pair",
    "System",
    "SystemResult",
    "ThresholdStudy",
    "bm25_candidates",
    "calibrate",
    "compare_runs",
    "evaluate",
    "read_compared",
    "read_run",
    "run_candidates",
    "scope_of",
    "study_thresholds",
    "worth_judging",
    "write_pairs",
    "write_run",
]
