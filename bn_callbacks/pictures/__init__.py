"""Pictures of lags, drawn by libraries that are imported on first use."""

from bn_callbacks.pictures.bars import draw_before_and_after, draw_lags
from bn_callbacks.pictures.heat_map import draw_heat_map, is_available

__all__ = [
    "draw_before_and_after",
    "draw_heat_map",
    "draw_lags",
    "is_available",
]
