"""Models to measure: the shipped tiny one, and random weights in sizes that say something.

A shape gives a RoE model, a stock model on the same tensors, prompts, and what is measured of it by default.

B batch, S sequence.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_roe import RoeLlavaConfig
from ..convert.bases import refuse_other_bases
from ..convert.completeness import check_files
from ..convert.fingerprint import base_kinds, base_signatures
from ..convert.folder_files import read_base_config
from ..convert.source import read_json, resolve_source
from ..convert.verify_prompts import stock_twin
from ..convert.weights import open_checkpoint
from ..examples.tiny_world.demo import SHIPPED, check_parts
from ..grafting_roe import fetch_adapter, no_warning_of_missing_parts
from ..identity_roe import difference, record_name
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..processing_roe import RoeLlavaProcessor

ALL_SHARES = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5)

BATCH_SIZES = (1, 2, 4, 8)
WHOLE_GRID = dict.fromkeys(BATCH_SIZES, ALL_SHARES)
SHORT_GRID = dict.fromkeys(BATCH_SIZES, (0.25,)) | {1: ALL_SHARES}  # all shares at batch 1, one at the others

MEDIUM_ROUNDS = {1: 10, 2: 5, 4: 4, 8: 4}  # about half an hour on one core

BEFORE_IMAGE = 5  # tokens of a random prompt that come before its image
FIRST_WORD = 3  # token ids below are special ones
TINY_PROMPTS = 3
QUESTION = 64  # tokens behind the image of a prompt for a base's folder


@dataclass(frozen=True)
class Subject:
    """What a shape gives to measure.

    Attributes:
        roe: the RoE model, in eval mode.
        base: stock LLaVA on the same tensors.
        prompts: gives, for a batch size, the inputs of the RoE model, one batch per kind of prompt; no row is padded.
        trained: whether the routers were trained; of random ones, the routes are whatever comes out.
    """

    roe: PreTrainedModel
    base: PreTrainedModel
    prompts: Callable[[int], list[dict[str, Tensor]]]
    trained: bool


@dataclass(frozen=True)
class Shape:
    """A model to measure, and how.

    Attributes:
        build: makes the `Subject` on a device, in a dtype.
        grid: batch size to the skip shares measured there.
        rounds: batch size to how often every system runs, over all prompts. Most at batch 1, where the differences to
            be told apart are smallest.
        threads: of torch; `None` leaves torch its own number.
        needs_gpu: whether a processor would take hours.
    """

    build: Callable[[torch.device, torch.dtype], Subject]
    grid: dict[int, tuple[float, ...]]
    rounds: dict[int, int]
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    needs_gpu: bool = False


def build_subject(
    name: str, device: str | None = None, dtype: str | None = None, shape: Shape | None = None
) -> Subject:
    """The models and prompts of a shape, by default the one of that name.

    Raises: ValueError for a device that is not there, or too slow for the shape.
    """
    shape = SHAPES[name] if shape is None else shape
    device, dtype = torch.device(device or shape.device), getattr(torch, dtype or shape.dtype)
    if shape.needs_gpu and device.type == "cpu":
        raise ValueError(f"shape {name} is made for a GPU and takes hours on a processor: use --shape cpu-medium there")
    if device.type != "cpu" and not torch.accelerator.is_available():
        raise ValueError(f"device {device} for shape {name}: torch finds no accelerator here; cpu-medium needs none")
    return shape.build(device, dtype)


# ------------------------------------------------------------------------------------------------------ random weights


def llava_15_config(hidden: int, ffn: int, layers: int, heads: int) -> RoeLlavaConfig:
    """LLaVA-1.5's configuration: Vicuna of a size, CLIP-L/14 at 336 pixels (576 tokens), the published adapter."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 336, "projection_dim": 768}
    return random_config((hidden, ffn, layers, heads), vision, adapter_size=1024)


def cpu_medium_config() -> RoeLlavaConfig:
    """A quarter of LLaVA-1.5-7B's width in 12 layers, 256 image tokens; an adapter costs 4.1 % of a layer, as there."""
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    return random_config((1024, 2752, 12, 16), vision | {"image_size": 224, "projection_dim": 256}, adapter_size=256)


def random_config(text: tuple[int, int, int, int], vision: dict, adapter_size: int) -> RoeLlavaConfig:
    """Configuration of a Llama (hidden size, FFN, layers, heads) behind a CLIP tower of 14-pixel patches."""
    hidden, ffn, layers, heads = text
    llama = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    tower = CLIPVisionConfig(patch_size=14, **vision)
    image_tokens = (tower.image_size // tower.patch_size) ** 2
    return RoeLlavaConfig(
        text_config=llama,
        vision_config=tower,
        image_token_index=32000,
        image_seq_length=image_tokens,
        adapter_size=adapter_size,
    )


def random_subject(config: RoeLlavaConfig, lengths: tuple[int, ...], device: torch.device, dtype) -> Subject:
    """Random weights, made on the device in the dtype, and prompts of one image and so many tokens in all."""
    torch.manual_seed(0)
    with device:
        roe = RoeLlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    for name, module in roe.named_modules():  # as from_pretrained has it: decisions are made in float32
        if name.rpartition(".")[2] in roe._keep_in_fp32_modules_strict:
            module.float()
    return Subject(
        roe,
        stock_twin(roe),
        lambda batch_size: [random_prompt(config, length, batch_size, device, dtype) for length in lengths],
        trained=False,
    )


def random_prompt(config: RoeLlavaConfig, length: int, batch_size: int, device: torch.device, dtype) -> dict:
    """A batch of prompts (B, S) of other words and another image in every row.

    Raises: ValueError if there is no room for the image and a question.
    """
    generator = torch.Generator().manual_seed(length)
    after_image = BEFORE_IMAGE + config.image_seq_length
    if length <= after_image:
        raise ValueError(f"a prompt of {length} tokens has no room for {after_image} with the image and a question")
    ids = torch.randint(FIRST_WORD, config.image_token_id, (batch_size, length), generator=generator)
    ids[:, BEFORE_IMAGE:after_image] = config.image_token_id
    size = config.vision_config.image_size
    pixels = torch.randn(batch_size, 3, size, size, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, dtype),
    }


# ------------------------------------------------------------------------------------------------------ a base's folder


def folder_shape(base: str, adapter: str | None) -> Shape:
    """A base of whatever front-end, and its adapter file; without one, untrained parts of its size stand in."""
    return Shape(
        lambda device, dtype: folder_subject(base, adapter, device, dtype), SHORT_GRID, MEDIUM_ROUNDS, threads=1
    )


def folder_subject(base: str, adapter: str | None, device: torch.device, dtype: torch.dtype) -> Subject:
    """The base's weights, and prompts of one image and a question of random words.

    Raises: ValueError if it is no base, or the adapter is not one of its sizes.
    """
    folder = resolve_source(base).folder
    refuse_other_bases(read_json(folder / "config.json").get("model_type"), folder, "bench --base")
    read_base_config(folder)
    check_files(folder)
    if adapter is None:
        with no_warning_of_missing_parts():
            roe = RoeLlavaForConditionalGeneration._load(folder, dtype=dtype)[0]
    else:
        # The files are compared: a base loaded in another dtype than the adapter's cannot be.
        check_trained_on(folder, adapter)
        roe = RoeLlavaForConditionalGeneration.from_base(folder, adapter, check_base=False, dtype=dtype)
    roe, length = roe.to(device).eval(), BEFORE_IMAGE + roe.config.image_seq_length + QUESTION
    return Subject(
        roe,
        stock_twin(roe),
        lambda batch_size: [random_prompt(roe.config, length, batch_size, device, dtype)],
        trained=adapter is not None,
    )


def check_trained_on(folder: Path, adapter: str) -> None:
    """Raises: ValueError if a base's weights are not those that an adapter recorded; it need not have recorded any."""
    info = fetch_adapter(adapter, None).info
    recorded, checkpoint = (info.base or {}).get("tensors"), open_checkpoint(folder)
    if not recorded:
        return
    reason = difference(base_kinds(checkpoint), recorded) or difference(base_signatures(checkpoint), recorded)
    if reason is not None:
        raise ValueError(
            f"--base {folder} is not the base that --adapter {adapter} was trained on ({record_name(info.base)}): "
            f"{reason}. Its routes would mean nothing: give that base"
        )


# --------------------------------------------------------------------------------------------------- the shipped model


def tiny_subject(device: torch.device, dtype: torch.dtype) -> Subject:
    """The shipped tiny LLaVA with its trained parts, and held-out questions."""
    base, adapter = SHIPPED / "base", SHIPPED / "roe"
    check_parts(base, adapter)
    logging.disable_progress_bar()
    # Weights can only be compared with what the adapter recorded in the dtype they are stored in; the demo does so.
    roe = RoeLlavaForConditionalGeneration.from_base(base, adapter, check_base=False, dtype=dtype).to(device).eval()
    processor = RoeLlavaProcessor.from_pretrained(base)
    return Subject(roe, stock_twin(roe), lambda size: tiny_prompts(processor, size, device, dtype), trained=True)


def tiny_prompts(processor, batch_size: int, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Batches of held-out questions: of one length each, so that nothing is padded, and of the commonest lengths."""
    from ..examples.tiny_world.asking import prompts
    from ..examples.tiny_world.world import TinyWorld

    examples = list(TinyWorld("test", 24 * max(batch_size, 4), seed=0, num_turns=1))
    lengths = [prompts(processor, [example])["input_ids"].shape[1] for example in examples]
    chosen = [length for length, number in Counter(lengths).most_common() if number >= batch_size][:TINY_PROMPTS]
    by_length = [[item for item, own in zip(examples, lengths, strict=True) if own == length] for length in chosen]
    return [dict(prompts(processor, of_length[:batch_size]).to(device, dtype)) for of_length in by_length]


def gpu_shape(*sizes: int) -> Shape:
    """LLaVA-1.5 with a decoder of these sizes, in bf16, prompts of 640 tokens."""
    return Shape(
        lambda *on: random_subject(llava_15_config(*sizes), (640,), *on),
        WHOLE_GRID,
        rounds=dict.fromkeys(BATCH_SIZES, 9) | {1: 15},
        dtype="bfloat16",
        device="cuda",
        needs_gpu=True,
    )


SHAPES = {
    "tiny": Shape(tiny_subject, WHOLE_GRID, rounds=dict.fromkeys(BATCH_SIZES, 21), threads=1),
    "cpu-medium": Shape(
        # One thread: what else the machine does then delays one run and not every step of all threads.
        lambda *on: random_subject(cpu_medium_config(), (320, 480, 640), *on),
        SHORT_GRID,
        MEDIUM_ROUNDS,
        threads=1,
    ),
    "llava-1.5-7b": gpu_shape(4096, 11008, 32, 32),
    "llava-1.5-13b": gpu_shape(5120, 13824, 40, 40),
}

__all__ = ["SHAPES", "Shape", "Subject", "build_subject", "folder_shape"]
