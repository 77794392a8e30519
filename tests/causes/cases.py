"""All cases: some for every row of CAUSES, and for all that must stay silent."""

import averages
import batches
import modes
import replays
import replicas
import silent
from kit import Case

CASES: list[Case] = [
    *averages.cases,
    *batches.cases,
    *modes.cases,
    *replays.cases,
    *replicas.cases,
    *silent.cases,
]
