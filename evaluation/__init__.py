"""Benchmarks through lmms-eval, along the routes that `generate` takes."""
