"""Gradient checkpointing that loses no gradients of what routes, under its new name and its old one."""

from transformers import PreTrainedModel

HAS_NEW_NAME = hasattr(PreTrainedModel, "activation_checkpointing_enable")  # from Transformers 5.23 on


class NonReentrantMixin:
    """Put in front of Transformers' class: layers are recomputed in the non-reentrant way.

    Attributes:
        reentrant_loses: what comes to a layer other than as an argument: reentrant checkpointing gives it no gradient.
    """

    reentrant_loses: str

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs):
        """As in Transformers; also what `gradient_checkpointing_enable` calls.

        Raises: ValueError for `use_reentrant=True`, whose gradients would not be whole.
        """
        settings = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})  # torch's own default is True
        if settings["use_reentrant"] is not False:
            raise ValueError(
                f"use_reentrant=True loses the gradients of {self.reentrant_loses}: leave it out, or set it False"
            )
        stock = super().activation_checkpointing_enable if HAS_NEW_NAME else super().gradient_checkpointing_enable
        stock(settings, **kwargs)

    if not HAS_NEW_NAME:

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
            """As `activation_checkpointing_enable`."""
            self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


__all__ = ["NonReentrantMixin"]
