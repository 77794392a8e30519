"""Pictures of lags. Imports the libraries that draw them on first use."""

from bn_callbacks.pictures.bars import draw_bars
from bn_callbacks.pictures.heat_map import CARD_ROWS, HeatMap, is_available

__all__ = ["CARD_ROWS", "HeatMap", "draw_bars", "is_available"]
