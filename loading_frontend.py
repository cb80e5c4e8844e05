"""How a base with a front-end of ours is opened and saved: nothing is made up, and a folder carries its own code."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# What opens a saved folder. `AutoModel` gives the generative class, as is usual for remote code.
FRONTEND_AUTO_MAP = {
    "AutoConfig": "configuration_frontend.FrontendLlavaConfig",
    "AutoModel": "modeling_frontend.FrontendLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_frontend.FrontendLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_frontend.FrontendLlavaForConditionalGeneration",
}


class FrontendLoadingMixin:
    """`from_pretrained` that refuses incomplete checkpoints, `save_pretrained` that names the code."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Transformers; the folder also gets the code that `trust_remote_code=True` loads."""
        self.config.auto_map = dict(FRONTEND_AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, source, *args, output_loading_info=False, **kwargs):
        """As in Transformers, but weights that are not in the checkpoint are an error and not a fresh initialisation.

        Raises: ValueError naming the missing tensors.
        """
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ValueError(
                f"{source} lacks {len(missing)} tensors of this model: {shown}. They are not made up: was a shard "
                "lost, or do vision_config and projector_type describe another front-end?"
            )
        return (model, info) if output_loading_info else model


def register_frontend_names(head: type, base: type) -> None:
    """Tell Transformers how llava-hf checkpoints name LLaVA's weights, which custom classes do not inherit."""
    for cls, stock in ((head, "llava"), (base, "LlavaModel")):
        # Overwritten because the Hub loader may execute these files again.
        register_checkpoint_conversion_mapping(cls.__name__, get_checkpoint_conversion_mapping(stock), overwrite=True)


__all__ = ["FRONTEND_AUTO_MAP", "FrontendLoadingMixin", "register_frontend_names"]
