"""Gradient checkpointing that keeps the gradients of routing tokens, under its new name and its old one."""

from transformers import PreTrainedModel

HAS_NEW_NAME = hasattr(PreTrainedModel, "activation_checkpointing_enable")  # from Transformers 5.23 on


class RoeCheckpointingMixin:
    """Put in front of Transformers' class: layers are recomputed in the non-reentrant way."""

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs):
        """As in Transformers; also what `gradient_checkpointing_enable` calls.

        Raises: ValueError for `use_reentrant=True`, whose gradients would lack what flows through routing tokens.
        """
        settings = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})  # torch's own default is True
        if settings["use_reentrant"] is not False:
            raise ValueError("use_reentrant=True loses the gradients of routing tokens: leave it out, or set it False")
        stock = super().activation_checkpointing_enable if HAS_NEW_NAME else super().gradient_checkpointing_enable
        stock(settings, **kwargs)

    if not HAS_NEW_NAME:

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
            """As `activation_checkpointing_enable`."""
            self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


__all__ = ["RoeCheckpointingMixin"]
