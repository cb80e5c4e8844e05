"""A small visual-question world and a stock LLaVA trained on it from scratch.

`world` draws scenes and asks about them, `processor` turns chats into tensors, `base_model` builds the network,
`train_base` trains it with one command, `evaluate` answers held-out questions with any LLaVA-like model.
"""
