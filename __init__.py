"""RoE-LLaVA: Routing Experts for LLaVA, a Hugging Face Transformers plug-in."""
