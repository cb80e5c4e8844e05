"""How a RoE-LLaVA is opened and saved: nothing is left at random in silence, and a folder carries its own code."""

from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .adapter_roe import RoutingSizes, routing_shapes, split_routing_parts
from .hub_roe import HubMixin

logger = logging.get_logger(__name__)
# Below Transformers' own logger, so that its verbosity decides, whatever module this file is loaded as.
notices = logging.get_logger("transformers.roe_llava")


def auto_map(config: str, model: str) -> dict[str, str]:
    """What opens a saved folder. `AutoModel` gives the generative class, as is usual for remote code."""
    generative = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    return {"AutoConfig": config} | dict.fromkeys(generative, model)


AUTO_MAP = auto_map("configuration_roe.RoeLlavaConfig", "modeling_roe_llava.RoeLlavaForConditionalGeneration")

# Parts RoE adds to the base, by the part of a parameter's name they are known by; experts have routers in their MLPs.
ROE_PARTS = (".router.", ".adapter.", ".routing_tokens.")
OF_EXPERTS, EXPERT_PART = ".mlp.router.", ".mlp.experts."


class RoeLoadingMixin(HubMixin):
    """`from_pretrained` that refuses incomplete checkpoints, `save_pretrained` that names the code.

    Attributes:
        code_map: the `auto_map` of its folders.
        class_of_base: the class of ours that a base of it is loaded with; `None` where that is a stock one.
    """

    code_map: dict[str, str]
    class_of_base: type | None = None

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Transformers; the folder also gets the code that `trust_remote_code=True` loads."""
        self.config.auto_map = dict(self.code_map)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, source, *args, output_loading_info=False, allow_untrained=False, **kwargs):
        """As in Transformers, but weights that are not in the checkpoint are an error and not a fresh initialisation.

        A stock checkpoint loads whole: its routing parts are new, which a warning says.

        Args:
            source: folder or Hub id.
            allow_untrained: initialise missing routing parts of a RoE checkpoint too (to start training from it).
        Raises: ValueError naming the missing tensors.
        """
        model, info = cls._load(source, *args, allow_untrained=allow_untrained, **kwargs)
        if info["missing_keys"]:
            num_new = sum(is_roe_parameter(name) for name in model.state_dict())
            logger.warning(
                f"{len(info['missing_keys'])} of the {num_new} routing tensors (routers, adapters, tokens) are not in "
                f"{source} and start untrained: train them, graft trained ones onto the checkpoint (from_base), or pin "
                "routes=."
            )
        model.tell_what_is_routed()
        return (model, info) if output_loading_info else model

    def lacking_parts(self, names) -> set[str]:
        """Names in memory of the routing parts that are not among those on disk."""
        if self.config.skipped_layers is not None:  # baked: its routers and routing tokens are gone for good
            return set()
        expected = routing_shapes(RoutingSizes.of_config(self.config)).keys()
        return expected - split_routing_parts(dict.fromkeys(names))[1].keys()

    def tell_what_is_routed(self) -> None:
        """Say, at log level info, how many layers are routed and what that adds to the base."""
        if notices.isEnabledFor(logging.INFO):
            notices.info(routing_notice(self))

    @classmethod
    def _load(cls, source, *args, allow_untrained=False, **kwargs):
        """(model, loading info) of a checkpoint that lacks nothing but routing parts, and those only where it may.

        Raises: ValueError naming the missing tensors.
        """
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        new = sorted(name for name in model.state_dict() if is_roe_parameter(name))
        if missing:
            own_type = source_config(source, kwargs).get("model_type")
            is_stock = missing == new and own_type != cls.config_class.model_type
            if not set(missing) <= set(new) or not (is_stock or allow_untrained):
                raise ValueError(missing_weights_message(source, missing, len(new)))
        model.config.model_type = cls.config_class.model_type  # a stock config keeps its own name on the instance
        return model, info


class RefusesFlashAttention:
    """Put in front of a model's class: FlashAttention, the package's and the Hub's kernels, is refused by its name.

    Before Transformers looks for the package, so that nobody installs it in vain.
    """

    _supports_flash_attn = False

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        refuse_flash_attention(requested_attention)
        return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        refuse_flash_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


def refuse_flash_attention(name: str | None) -> None:
    """Raises: ValueError if an attention implementation is some FlashAttention."""
    if is_flash_attention_requested(requested_attention_implementation=name):
        raise ValueError(
            f"attn_implementation={name!r} is not supported by RoE-LLaVA: FlashAttention packs the rows of a batch "
            "into one, where the rows of a mixed route cannot be told apart. Use 'sdpa' (the default, which runs "
            "torch's own flash kernels where it can), 'flex_attention' or 'eager'"
        )


def source_config(source, kwargs: dict) -> dict:
    """What a checkpoint's own config.json says, whatever config the caller loads it with."""
    where = ("cache_dir", "revision", "token", "subfolder", "local_files_only", "proxies")
    return PreTrainedConfig.get_config_dict(source, **{k: kwargs[k] for k in where if k in kwargs})[0]


def is_roe_parameter(name: str) -> bool:
    """Whether a parameter (in memory or on disk) is one of those RoE adds to the base."""
    return any(part in name for part in ROE_PARTS) and OF_EXPERTS not in name


def routing_notice(model) -> str:
    """One line: layers that are routed, or skipped for good, and the parameters that RoE adds."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    added = sum(size for name, size in sizes.items() if is_roe_parameter(name))
    # Transformers' count knows quantised weights; sharded ones (DeepSpeed ZeRO-3) are empty to it.
    total = max(model.num_parameters(), sum(sizes.values()))
    config, num_layers = model.config, model.config.text_config.num_hidden_layers
    if config.skipped_layers is not None:
        done = f"route baked, {len(config.skipped_layers)} of {num_layers} layers skipped for every input"
    else:
        done = (
            f"{num_layers if config.routed_layers is None else len(config.routed_layers)} of {num_layers} layers routed"
        )
    share = f" ({added / total:.1%} of {total:,})" if total else ""
    return f"RoE-LLaVA {config._name_or_path}: {done}, {added:,} parameters added{share}"


def missing_weights_message(source, missing: list[str], num_new: int) -> str:
    """What is missing, and why that may be."""
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    parts = sum(is_roe_parameter(name) for name in missing)
    if any(part in name for name in missing for part in (OF_EXPERTS, EXPERT_PART)):
        return (
            f"{source} lacks {len(missing)} tensors of this model: {shown}. They are not made up: was a shard lost, "
            "does moe_layers name other layers than were saved, or has the checkpoint no experts? roe-llava upcycle "
            "gives a dense LLaVA some"
        )
    return (
        f"{source} lacks {len(missing)} tensors of this model ({parts} of its {num_new} routing tensors): {shown}. "
        "A RoE checkpoint is never completed with random weights: was a shard lost, or was the folder saved by "
        "the stock class, which drops the routing parts?"
    )


def stock_class(cls: type) -> type:
    """The class of Transformers' own that a class of ours is put in front of."""
    return next(one for one in cls.__mro__ if one.__module__.startswith("transformers.models."))


def base_class(cls: type) -> type:
    """The class of the base that a routed class puts its parts onto."""
    return cls.class_of_base or stock_class(cls)


def register_names(head: type, base: type) -> None:
    """Tell Transformers how stock checkpoints name their weights, which custom classes do not inherit."""
    for cls, source in ((head, stock_class(head).config_class.model_type), (base, stock_class(base).__name__)):
        # Overwritten because the Hub loader may execute these files again.
        register_checkpoint_conversion_mapping(cls.__name__, get_checkpoint_conversion_mapping(source), overwrite=True)


__all__ = [
    "AUTO_MAP",
    "RefusesFlashAttention",
    "RoeLoadingMixin",
    "auto_map",
    "base_class",
    "is_roe_parameter",
    "register_names",
    "source_config",
    "stock_class",
]
