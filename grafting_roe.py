"""Routing parts put onto a base, loaded or named, and swapped: `from_base`, `from_adapter` and `load_routing`.

Nothing on the disk is written and no weight of the base is copied. Everything is read, checked and put on its device
before the first part takes its place, so an error leaves a model as it was.
"""

import copy
import logging
import re
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.hub import cached_files

from .adapter_roe import (
    ABOUT_NAME,
    MEMORY_PREFIX,
    WEIGHTS_NAME,
    Adapter,
    AdapterInfo,
    RoutingSizes,
    check_finite,
    check_fits,
    expanded,
    is_unread,
    listed,
    read_adapter,
    routing_shapes,
    split_routing_parts,
)
from .baked_roe import refuse_baked
from .configuration_frontend import FrontendLlavaConfig
from .configuration_roe import BAKED_FIELDS, ROUTING_FIELDS
from .identity_roe import difference, record_name, signatures_of, tensor_kind
from .loading_roe import RoeLoadingMixin, base_class, source_config

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
WRITE_A_FOLDER = "write the model into a folder (roe-llava graft BASE ADAPTER OUT) and load that with the same options"


class RoeGraftingMixin(RoeLoadingMixin):
    """`from_base`, `from_adapter` and `load_routing`, on top of loading and saving."""

    @classmethod
    def from_pretrained(cls, source, *args, config=None, **kwargs):
        """As in `RoeLoadingMixin`; a repository of an adapter alone, as `roe-llava push` makes it, brings its base."""
        if not is_adapter_alone(source, config, kwargs):
            return super().from_pretrained(source, *args, config=config, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "adapter_kwargs")}
        return cls._of_adapter(source, config, **kwargs)

    @classmethod
    def from_adapter(cls, adapter, *, check_base: bool = True, revision: str | None = None, **kwargs):
        """A model of an adapter file and the base that it names, which is had from the Hub at the commit named.

        Args: as in `from_base`; `kwargs` are options of `from_pretrained` for the base.
        Raises: ValueError if the adapter names no base on the Hub, and as `from_base`.
        """
        return cls._of_adapter(adapter, None, check_base=check_base, revision=revision, **kwargs)

    @classmethod
    def _of_adapter(cls, adapter, config, *, check_base: bool = True, revision: str | None = None, **kwargs):
        """As `from_adapter`; a config was read from beside the adapter, and maybe changed by the caller."""
        taken = fetch_adapter(adapter, revision, {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs})
        base, base_revision = base_on_hub(taken.info, adapter)
        if config is not None:
            config = copy.deepcopy(config)
            config.__dict__.pop("roe_adapter_only", None)  # it becomes a whole model
            if (sizes := RoutingSizes.of_config(config)) != taken.info.sizes:
                raise ValueError(f"config of {sizes} given for the adapter {adapter}, which is of {taken.info.sizes}")
        model = cls._load_base(base, base_revision, check_base, kwargs, taken.info, config)
        model._take_adapter(taken, str(adapter), check_base)
        for field in ROUTING_FIELDS if config is not None else ():
            if getattr(config, field) is not None:  # a table that was measured since stands in the adapter alone
                setattr(model.config, field, getattr(config, field))
        return model

    @classmethod
    def from_base(
        cls, base, adapter, *, check_base: bool = True, revision: str | None = None, base_revision=None, **kwargs
    ):
        """A model of a base and an adapter file, without a grafted folder; the same to the bit.

        A loaded base stays usable beside the result: the two share the storage of the base's weights (a step of an
        optimizer on one changes both), while modules, config and generation settings are the result's own.

        Args:
            base: a loaded model of the stock class, or the folder or Hub id of a llava-hf checkpoint.
            adapter: folder or Hub id of an adapter file (`roe_adapter.json` and `roe_adapter.safetensors`).
            check_base: compare every weight of the base with what the adapter recorded in training; reads all of it
                once. Not possible for a quantised base, or one loaded in another dtype than the adapter was trained on.
            revision: of the adapter on the Hub.
            base_revision: of the base on the Hub.
            kwargs: for a folder or Hub id: options of `from_pretrained` (`device_map`, `dtype`, ...); what says how to
                reach the Hub (`token`, `cache_dir`, ...) serves the adapter too.
        Raises: ValueError if the base is not the one that the adapter was trained on, if the adapter is damaged, or if
            the base is spread out, offloaded or quantised in a way that parts cannot be put onto it.
        """
        taken = fetch_adapter(adapter, revision, {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs})
        if isinstance(base, str | PathLike):
            model = cls._load_base(base, base_revision, check_base, kwargs, taken.info)
        elif kwargs or base_revision is not None:
            given = sorted(kwargs | ({} if base_revision is None else {"base_revision": base_revision}))
            raise ValueError(
                f"{listed(given)} given with a loaded base, which has its options already: they are for a base given "
                "as a folder or Hub id"
            )
        else:
            check_loaded_base(base, cls)
            model = cls._around(base, taken.info)
        model._take_adapter(taken, str(adapter), check_base)
        model.tell_what_is_routed()
        return model

    def load_routing(self, adapter, *, check_base: bool = True, revision: str | None = None):
        """Replace routers, adapters and routing tokens, and what the config says of them, by those of an adapter file.

        The file may have another adapter size and route other layers. An optimizer made before does not know the new
        parameters. A cache filled before keeps its routes and what the old parts computed: start from an empty one.

        Args: as in `from_base`.
        Returns: the model itself.
        Raises: as `from_base`; the model is then as it was.
        """
        self._take_adapter(fetch_adapter(adapter, revision), str(adapter), check_base)
        return self

    @classmethod
    def _load_base(cls, base, revision: str | None, check_base: bool, kwargs: dict, info: AdapterInfo, routed=None):
        """A base from disk, its routing parts random but of the adapter's sizes; `routed` is its config if known."""
        not_ours = {*ROUTING_FIELDS, *BAKED_FIELDS, "config", "output_loading_info", "allow_untrained"}
        if own := sorted(kwargs.keys() & not_ours):
            raise ValueError(f"{listed(own)} given to from_base: sizes and routing fields are the adapter's")
        options = kwargs | ({} if revision is None else {"revision": revision})
        config = source_config(base, options)
        if config.get("model_type") not in cls.config_class.base_types:
            raise ValueError(
                f"{base} has model_type {config.get('model_type')!r}, expected "
                f"{' or '.join(map(repr, cls.config_class.base_types))}: parts are put onto bases, and every kind of "
                "base has a RoE class of its own; open a RoE checkpoint with from_pretrained, and swap its parts with "
                "load_routing"
            )
        whole = cls.config_class.from_dict({**config, "model_type": cls.config_class.model_type})
        check_fits(info.sizes, RoutingSizes.of_config(whole), "the adapter", base)
        if check_base and (kwargs.get("quantization_config") or config.get("quantization_config")):
            raise ValueError(quantised_message(base))
        with no_warning_of_missing_parts():
            model, report = cls._load(
                base, **options, **(info.routing_fields if routed is None else {"config": routed})
            )
        if sorted(report["missing_keys"]) != sorted(routing_shapes(info.sizes)):
            raise ValueError(f"{base} holds routing tensors already, expected the weights of a base alone")
        return model

    @classmethod
    def _around(cls, base: PreTrainedModel, info: AdapterInfo):
        """A model on a loaded base's tensors, its routing parts still empty (on the meta device)."""
        check_fits(info.sizes, RoutingSizes.of_config(routed_config(cls, base.config, {})), "the adapter", "model")
        model = empty_model(cls, base.config, info.routing_fields, base.dtype)
        share_tensors(model, base)
        model.generation_config = copy.deepcopy(base.generation_config)
        if hasattr(base, "_weight_conversions"):  # the names that `save_pretrained` gives to weights
            model._weight_conversions = base._weight_conversions
        return model.train(base.training)

    def _take_adapter(self, adapter: Adapter, name: str, check_base: bool) -> None:
        """Check an adapter against this model and put its parts in place of the present ones."""
        info = adapter.info
        refuse_baked(self.config.skipped_layers, "there are none to replace", self.config._name_or_path)
        check_fits(info.sizes, RoutingSizes.of_config(self.config), name, self.config._name_or_path or "model")
        check_own_parts(self)
        if check_base:
            check_same_base(self, info, name)
        fresh = empty_model(type(self), self.config, info.routing_fields, self.dtype)
        fill_parts(fresh, adapter.tensors, self, name)
        old, new = self.model.language_model, fresh.model.language_model
        is_trained = old.routing_tokens.weight.requires_grad
        for owner, part, module in routing_modules(new):
            if module is not None:
                module.train(self.training).requires_grad_(is_trained)
            setattr(old.get_submodule(owner), part, module)
        for field in ROUTING_FIELDS:
            setattr(self.config, field, getattr(fresh.config, field))
        self.routing_tally.forget_decisions()
        self.config.roe_provenance = provenance(self.config, info, check_base)


# ----------------------------------------------------------------------------------------------------- what is given


def fetch_adapter(source, revision: str | None, hub_options: dict | None = None) -> Adapter:
    """An adapter file from a folder, or from the Hub or its cache; `hub_options` are some of `HUB_OPTIONS`.

    Raises: ValueError if there is none, or it is damaged.
    """
    folder = expanded(source)
    if folder.name in (ABOUT_NAME, WEIGHTS_NAME) and folder.is_file():
        folder = folder.parent  # an adapter is both files
    if folder.is_dir() and revision is not None:
        raise ValueError(f"revision {revision!r} given with the folder {folder}: only a Hub id has revisions")
    if not folder.is_dir():
        try:
            files = cached_files(str(source), [ABOUT_NAME, WEIGHTS_NAME], revision=revision, **(hub_options or {}))
            folder = Path(files[0]).parent
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            where = f"{source} (revision {revision})" if revision else source
            raise ValueError(f"{where} is no folder here and cannot be had from the Hub: {reason}") from error
    if not (folder / ABOUT_NAME).is_file():
        raise ValueError(
            f"{folder} has no {ABOUT_NAME}: is it an adapter folder? A whole RoE checkpoint opens with "
            "from_pretrained, and roe-llava extract takes its adapter out"
        )
    return read_adapter(folder)


def is_adapter_alone(source, config, kwargs: dict) -> bool:
    """Whether a source is a repository of an adapter alone, made to open as a model; its config.json says so."""
    if config is not None and not isinstance(config, str | PathLike):
        return bool(getattr(config, "roe_adapter_only", False))
    if config is not None or source is None or not isinstance(source, str | PathLike):
        return False
    return bool(source_config(source, kwargs).get("roe_adapter_only"))


def base_on_hub(info: AdapterInfo, name) -> tuple[str, str]:
    """Hub id and commit of the base that an adapter names.

    Raises: ValueError if it names none, or one that only the machine it was trained on has.
    """
    base = info.base or {}
    base_id, revision = base.get("id") or "", base.get("revision") or ""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base_id) and re.fullmatch(r"[0-9a-f]{40}", revision):
        return base_id, revision
    named = f"the base {record_name(base)!r}" if base_id else "no base"
    raise ValueError(
        f"{name} names {named}, expected the id of a repository on the Hub and a commit: was it trained on a folder? "
        "Give the base, from_base(BASE, ADAPTER); roe-llava push --base ID names one on the Hub when it is the same"
    )


def check_loaded_base(base, cls) -> None:
    """Check that a loaded base is one whose tensors a model of a RoE class can be built on.

    Raises: ValueError saying why not, and what to do.
    """
    if str(getattr(getattr(base, "config", None), "model_type", None)).startswith("roe_"):
        raise ValueError("the base has routing parts already: swap them with its load_routing(adapter)")
    expected = base_class_names(cls)
    if type(base).__name__ not in expected:
        raise ValueError(
            f"base is a {type(base).__name__}, expected a {' or '.join(expected)}, a folder or a Hub id; merge "
            "PEFT adapters and take wrappers off first"
        )
    if is_quantised(base):
        reason = "is quantised"
    elif any(hasattr(module, "_hf_hook") for module in base.modules()):
        reason = "is spread over devices by a device_map"
    elif odd := [name for name, parameter in base.named_parameters() if not is_plain(parameter)]:
        reason = f"has parameters that are no plain tensors in memory ({listed(odd)})"
    else:
        return
    raise ValueError(
        f"the loaded base {reason}, so no second model can be built on its tensors: pass its folder or Hub id with "
        "the same options instead, from_base(path, adapter, device_map=..., quantization_config=...)"
    )


def base_class_names(cls) -> list[str]:
    """Names of the classes a RoE class builds on: by name, as remote code makes classes anew."""
    names = [base_class(cls).__name__]
    if FrontendLlavaConfig.model_type in cls.config_class.base_types:
        names.append("FrontendLlavaForConditionalGeneration")
    return names


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is whole, in memory, and not of a quantiser's or a sharding's own tensor class."""
    return type(parameter) is nn.Parameter and not parameter.is_meta and not hasattr(parameter, "ds_id")


def is_quantised(model: nn.Module) -> bool:
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))


def quantised_message(name) -> str:
    return (
        f"the base {name} is quantised, so its weights cannot be compared with those that the adapter was trained on: "
        "pass check_base=False if you know that it is made from the same base"
    )


def check_own_parts(model) -> None:
    """Check that a model's routing parts are its own modules, and can be replaced.

    Raises: ValueError if they are wrapped, sharded or offloaded.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"DeepSpeed ZeRO-3 shards parameters as they are made: {WRITE_A_FOLDER}")
    parts = {name: p for name, p in model.named_parameters() if name.startswith(MEMORY_PREFIX)}
    parts = split_routing_parts(parts)[1]
    if lost := sorted(routing_shapes(RoutingSizes.of_config(model.config)).keys() - parts.keys()):
        raise ValueError(f"the model has no {listed(lost)}: are its routing parts wrapped (PEFT)? Unwrap them first")
    for index, layer in enumerate(model.model.language_model.layers):
        if not is_plain(layer.input_layernorm.weight):
            raise ValueError(
                f"layer {index} is offloaded or sharded, so parts cannot be put beside it: {WRITE_A_FOLDER}"
            )


def check_same_base(model, info: AdapterInfo, name: str) -> None:
    """Check a model's base weights, in memory, against what an adapter recorded of the base it was trained on.

    Raises: ValueError saying what differs and what to do.
    """
    recorded = (info.base or {}).get("tensors")
    if not recorded:
        raise ValueError(
            f"{name} does not say which base it was trained on, so it cannot be checked: pass check_base=False if you "
            "know that it was this one"
        )
    if is_quantised(model):
        raise ValueError(quantised_message(model.config._name_or_path))
    tensors = loaded_base_tensors(model, recorded)
    if any(".base_layer." in tensor_name for tensor_name in tensors):
        raise ValueError(
            f"PEFT put matrices onto the base, so it cannot be compared with what {name} was trained on: pass "
            "check_base=False if you know that it is the same base; the matrices stay"
        )
    if away := [tensor_name for tensor_name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(
            f"{listed(away)} of the base is offloaded and cannot be compared with what {name} was trained on: pass "
            "check_base=False if you know that it is the same base"
        )
    kinds = {tensor_name: tensor_kind(tensor) for tensor_name, tensor in tensors.items()}
    reason = difference(kinds, recorded) or difference(signatures_of(tensors), recorded)
    if reason is None:
        return
    known = f"{record_name(info.base)}, fingerprint {info.base.get('fingerprint')}"
    remedy = dtype_hint(kinds, recorded) or "Give that base"
    raise ValueError(
        f"the base is not the one {name} was trained on ({known}): {reason}. {remedy}, or pass check_base=False if "
        "this one is meant"
    )


def loaded_base_tensors(model, recorded: dict) -> dict[str, torch.Tensor]:
    """The base's tensors of a loaded model by name; of tied ones, the name that `recorded` has."""
    tensors = split_routing_parts(model.state_dict())[0]
    tensors = {name: tensor for name, tensor in tensors.items() if not is_unread(name)}
    for alias, source in model.all_tied_weights_keys.items():
        if alias not in recorded:
            tensors.pop(alias, None)
        elif source not in recorded:
            tensors.pop(source, None)
    return tensors


def dtype_hint(kinds: dict[str, str], recorded: dict[str, str]) -> str:
    """What to do where a base was only loaded in another dtype; empty where more than that differs."""

    def shapes(signatures: dict[str, str]) -> dict[str, str]:
        return {name: signature.split("[")[1].split("]")[0] for name, signature in signatures.items()}

    ours, theirs = ({kind.split(" ")[0] for kind in some.values()} for some in (kinds, recorded))
    same_dtypes = all(kinds[name].split(" ")[0] == recorded[name].split(" ")[0] for name in kinds.keys() & recorded)
    if same_dtypes or shapes(kinds) != shapes(recorded):
        return ""
    found, expected = " and ".join(sorted(ours)), " and ".join(sorted(theirs))
    if len(theirs) == 1:
        return f"It is loaded in {found}, they were trained on {expected}: load it with that dtype"
    return (
        f"It is loaded in {found}, they were trained on one stored in {expected}: it may be that base, but a model is "
        f"loaded in one dtype, so its values cannot be compared here: {WRITE_A_FOLDER}, where the files are compared"
    )


def provenance(config, info: AdapterInfo, was_checked: bool) -> dict:
    """Where the weights come from, as a grafted folder's config says.

    A base that was not checked is the one named before; if there is none, it has no fingerprint.
    """
    known = (getattr(config, "roe_provenance", None) or {}).get("base")
    if was_checked:
        known = {name: info.base.get(name) for name in ("id", "revision", "fingerprint")}
    known = known or {
        "id": config._name_or_path or None,
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": None,
    }
    return {"base": known, "training": info.training}


# -------------------------------------------------------------------------------------------------- building on a base


def routed_config(cls, config, routing_fields: dict):
    """A RoE config from a base's or a RoE model's, attention and dtype included.

    Raises: ValueError if the fields do not fit (range, layer numbers).
    """
    content = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    content |= {"model_type": cls.config_class.model_type, "architectures": [cls.__name__], **routing_fields}
    routed = cls.config_class.from_dict(content)
    # Copied as objects: attention implementations are not in the dict.
    routed.text_config, routed.vision_config = copy.deepcopy((config.text_config, config.vision_config))
    routed._attn_implementation_internal = config._attn_implementation
    routed._experts_implementation_internal = config._experts_implementation
    routed._name_or_path = config._name_or_path
    routed._commit_hash = getattr(config, "_commit_hash", None)
    return routed


def empty_model(cls, config, routing_fields: dict, dtype: torch.dtype):
    """A model of this config and these routing fields whose tensors are on the meta device, which takes no memory."""
    with torch.device("meta"):
        return cls._from_config(routed_config(cls, config, routing_fields), dtype=dtype)


def share_tensors(model, base) -> None:
    """Put a base's tensors into an empty model: parameters of their own on the same storage, buffers copied.

    Either may have routing parts too; those are left alone.

    Raises: ValueError if the base has other parameters than the model.
    """
    theirs, ours = (split_routing_parts(dict(one.named_parameters(remove_duplicate=False)))[0] for one in (base, model))
    if odd := sorted(theirs.keys() ^ ours.keys()):
        raise ValueError(
            f"the loaded base differs from a stock one in {listed(odd)}: was something added to it (PEFT)?"
        )
    shared: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for name, parameter in theirs.items():
        if parameter not in shared:
            shared[parameter] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        put(model, name, shared[parameter])
    for name, buffer in base.named_buffers(remove_duplicate=False):
        put(model, name, buffer.clone())
    assert not any(buffer.is_meta for buffer in model.buffers())


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)


def fill_parts(fresh, tensors: dict[str, torch.Tensor], model, source: str) -> None:
    """Put routing parts into an empty model, on the devices and in the dtypes that they have in `model`.

    Raises: ValueError if a value does not fit into the dtype.
    """
    exact = tuple(f".{name}." for name in model._keep_in_fp32_modules_strict)
    layers = model.model.language_model.layers
    for name, tensor in tensors.items():
        number = name.removeprefix(f"{MEMORY_PREFIX}layers.").split(".")[0]
        beside = layers[int(number) if number.isdigit() else 0].input_layernorm.weight
        dtype = torch.float32 if any(part in name for part in exact) else beside.dtype
        part = tensor.to(beside.device, dtype, copy=True)  # never the file's own pages
        check_finite(name, part, f"{source}, put into {dtype}")
        put(fresh, name, nn.Parameter(part))


def routing_modules(language_model):
    """(owner's name, attribute, module or `None`) of every routing part of a language model."""
    yield "", "routing_tokens", language_model.routing_tokens
    for index, layer in enumerate(language_model.layers):
        yield f"layers.{index}", "router", layer.router
        yield f"layers.{index}", "adapter", layer.adapter


@contextmanager
def no_warning_of_missing_parts():
    """Keep Transformers from reporting that routing parts are new, which is so until the adapter's take their place."""

    def tells_more(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or any(word in text for word in ("UNEXPECTED", "MISMATCH", "CONVERSION"))

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(tells_more)
    try:
        yield
    finally:
        logger.removeFilter(tells_more)


__all__ = ["RoeGraftingMixin"]
