"""`DebiasBatchNorm`: takes the start values out of the moving averages."""

import warnings
from typing import Any

import keras
import numpy as np

from bn_callbacks.layers import (
    assign_averages,
    check_model,
    find,
    is_built,
    set_corrected,
)
from bn_callbacks.report import BatchNormWarning
from bn_callbacks.statistics.moving_average import debias
from bn_callbacks.steps import StepCounter, announced_steps
