"""All cases: some for every row of CAUSES, and for all that must stay silent."""

import averages
import batches
import fresh_averages
import fresh_batches
import fresh_healthy
import fresh_modes
import modes
import replays
import replicas
import second_averages
import second_batches
import second_healthy
import second_modes
import silent
from kit import Case

CASES: list[Case] = [
    *averages.cases,
    *batches.cases,
    *modes.cases,
    *replays.cases,
    *replicas.cases,
    *silent.cases,
    *fresh_averages.cases,
    *fresh_batches.cases,
    *fresh_modes.cases,
    *fresh_healthy.cases,
    *second_averages.cases,
    *second_batches.cases,
    *second_modes.cases,
    *second_healthy.cases,
]
