"""Claims: a table's rows as configs, trained and evaluated by one command, with seeds, a cache and a record."""

from __future__ import annotations

from .claim import Claim, ClaimError, load_claim
from .harness import run_claim
from .jobs import Job, plan
from .process import SubprocessRunner
from .table import Table, collect

__all__ = ["Claim", "ClaimError", "Job", "SubprocessRunner", "Table", "collect", "load_claim", "plan", "run_claim"]
