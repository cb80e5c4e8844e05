"""Routes for the eye: a picture (`plot_routes`) and a table that text and notebooks show (`show_routes`)."""

from .pictures import plot_routes
from .tables import show_routes

__all__ = ["plot_routes", "show_routes"]
