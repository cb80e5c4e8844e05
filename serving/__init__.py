"""`transformers serve` for RoE checkpoints."""
