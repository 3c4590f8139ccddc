"""How much a deployment takes: bytes of each tier, replicas, requests and hours, from formulas that can be checked.

`benchmarks/sizing.py` compares them with measurements.
"""

from kalm_rag.sizing.bytes import EntryBytes, entry_bytes, folder_bytes, redis_bytes
from kalm_rag.sizing.costs import Costs, measure_costs
from kalm_rag.sizing.plan import Plan, Workload, plan

__all__ = [
    "Costs",
    "EntryBytes",
    "Plan",
    "Workload",
    "entry_bytes",
    "folder_bytes",
    "measure_costs",
    "plan",
    "redis_bytes",
]
