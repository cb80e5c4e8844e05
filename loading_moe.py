"""How a MoE-LLaVA is opened and saved: nothing is left at random in silence, and a folder carries its own code."""

import re

from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .hub_roe import HubMixin
from .listing_roe import listed

# What opens a saved folder. `AutoModel` gives the generative class, as is usual for remote code.
AUTO_MAP = {
    "AutoConfig": "configuration_moe_llava.MoeLlavaConfig",
    "AutoModel": "modeling_moe_llava.MoeLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_moe_llava.MoeLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_moe_llava.MoeLlavaForConditionalGeneration",
}

# Parts of a layer with experts, by the part of a parameter's name they are known by.
MOE_PARTS = (".mlp.experts.", ".mlp.router.")
PLACES = ("cache_dir", "revision", "token", "subfolder", "local_files_only", "proxies")
PARALLEL = ("tp_plan", "tp_size", "distributed_config")


class MoeLoadingMixin(HubMixin):
    """`from_pretrained` that refuses incomplete checkpoints, `save_pretrained` that names the code."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Transformers; the folder also gets the code that `trust_remote_code=True` loads."""
        self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, source, *args, output_loading_info=False, allow_untrained=False, **kwargs):
        """As in Transformers, but weights that are not in the checkpoint are an error and not a fresh initialisation.

        Args:
            source: folder or Hub id.
            allow_untrained: initialise missing routers (not experts), to start training from there.
        Raises: ValueError naming the missing tensors, or an option that experts do not work with.
        """
        refuse_parallel(kwargs)
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if [name for name in missing if not (allow_untrained and ".mlp.router." in name)]:
            where = {name: kwargs[name] for name in PLACES if name in kwargs}
            config = PreTrainedConfig.get_config_dict(source, **where)[0]  # its own, whatever the caller gave
            raise ValueError(missing_weights_message(source, missing, config))
        return (model, info) if output_loading_info else model

    def lacking_parts(self, names) -> set[str]:
        """Tensors of experts and routers, as names from the layer on, that are not among those on disk."""
        expected, found = (
            {within_layer(name) for name in some if is_moe_parameter(name)} for some in (self.state_dict(), names)
        )
        return expected - found


def refuse_parallel(kwargs: dict) -> None:
    """Raises: ValueError for an option of `from_pretrained` that splits layers."""
    for name in PARALLEL:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}={kwargs[name]!r} is not supported: the decoders' plans for tensor parallelism know dense "
                "MLPs alone. Leave it out; device_map places whole layers"
            )


def is_moe_parameter(name: str) -> bool:
    """Whether a parameter (in memory or on disk) belongs to experts or a router."""
    return any(part in name for part in MOE_PARTS)


def within_layer(name: str) -> str:
    """A name from its layer on, which memory and disk have in common."""
    return re.sub(r"^.*?\blayers\.", "layers.", name)


def missing_weights_message(source, missing: list[str], config: dict) -> str:
    """What is missing, and why that may be."""
    if config.get("model_type") == "llava":
        cause = f"it is a dense LLaVA, which roe-llava upcycle {source} OUT turns into one with experts"
    elif str(config.get("model_type")).startswith("moe_llava_"):
        cause = f"it is in the published layout, which roe-llava import-moe-llava {source} OUT turns into ours"
    else:
        cause = "was a shard lost, or does moe_layers name other layers than were saved?"
    return (
        f"{source} (model_type {config.get('model_type')!r}) lacks {len(missing)} tensors of this model: "
        f"{listed(missing, 5)}. They are not made up: {cause}"
    )


def register_moe_names(head: type, base: type) -> None:
    """Tell Transformers how llava-hf checkpoints name LLaVA's weights, which custom classes do not inherit."""
    for cls, stock in ((head, "llava"), (base, "LlavaModel")):
        # Overwritten because the Hub loader may execute these files again.
        register_checkpoint_conversion_mapping(cls.__name__, get_checkpoint_conversion_mapping(stock), overwrite=True)


__all__ = ["AUTO_MAP", "MoeLoadingMixin", "is_moe_parameter", "refuse_parallel", "register_moe_names"]
