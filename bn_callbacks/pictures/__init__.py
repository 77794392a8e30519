"""Pictures of lags, drawn by matplotlib, which is imported on first use."""

from bn_callbacks.pictures.bars import draw_before_and_after, draw_lags
from bn_callbacks.pictures.canvas import is_available
from bn_callbacks.pictures.heat_map import draw_heat_map, to_png

__all__ = [
    "draw_before_and_after",
    "draw_heat_map",
    "draw_lags",
    "is_available",
    "to_png",
]
