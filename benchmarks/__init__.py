"""Measurements of what the project promises; each prints what it measured and writes it as JSON."""
