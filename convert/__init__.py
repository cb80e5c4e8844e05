"""Checkpoints in and out: adapter files, and grafting them onto a LLaVA checkpoint."""
