"""LLaVA-HR's vision tower against the published one: same weights, same images, one process, by turns.

    python -m roe_llava.benchmarks.hr_frontend --published DIR [--image-size 384 768 1024] [--out JSON]

DIR is a checkout of the published repository (github.com/luogen1996/LLaVA-HR), which needs timm; nothing of it is part
of this package. Its constructors fetch weights and expect Transformers 4.31, so the tower is put together here of the
published classes: ConvNeXt, the adapters, the fusion and the forward pass are its own, the CLIP layers are those of the
Transformers at hand with the outputs of the old ones. They attend as Transformers 4.31 did ("eager", the published
tower); with --fused there is one more that attends through PyTorch's fused kernel, which the published one never did.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from ..configuration_hr_vision import CONVNEXT_XXL, LlavaHrVisionConfig
from ..convert.hr_layout import POSITIONS, TOWER, published_name
from ..convert.output import replace_json
from ..convert.state_dict import listed
from ..vision_hr import LlavaHrVisionModel
from .environment import command_line, describe_machine
from .timing import now

RESULT = Path(__file__).parent / "results" / "hr_frontend.json"
ENCODER = Path("llava_hr") / "model" / "multimodal_encoder"
SLOW_TOWERS = {"large": None, "xxlarge": CONVNEXT_XXL}
PUBLISHED = {"published": "eager", "published, fused": "sdpa"}  # attention of its CLIP layers
# In single precision; features are of a few units.
TOLERANCE = 2e-4
UNUSED = (".class_embedding", ".post_layernorm.", ".head.")


# ---------------------------------------------------------------------------------------------------- the published one


def published_modules(checkout: Path) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The published files with the towers: (wrapper, CLIP, ConvNeXt).

    Raises: ValueError if the checkout is none, or what it needs is not installed.
    """
    folder = checkout / ENCODER
    if not (folder / "multipath_encoder_wapper.py").is_file():
        raise ValueError(
            f"{checkout} has no {ENCODER / 'multipath_encoder_wapper.py'}, expected a checkout of the published "
            "LLaVA-HR"
        )
    package = ModuleType("published_llava_hr")
    package.__path__ = [str(folder)]
    # The class in this file builds itself by a download and needs DeepSpeed. Nothing of it runs in a forward pass.
    unused = ModuleType("published_llava_hr.convnext_encoder")
    unused.ConvNextVisionTower = nn.Module
    sys.modules |= {package.__name__: package, unused.__name__: unused}
    names = ("multipath_encoder_wapper", "clip_encoder", "convnext")
    try:
        return tuple(importlib.import_module(f"{package.__name__}.{name}") for name in names)
    except ImportError as error:
        raise ValueError(f"the published code in {checkout} cannot be imported: {error} (it needs timm 0.9)") from error


class OldLayer(nn.Module):
    """A CLIP layer that takes and returns what it did in Transformers 4.31."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: None, causal_attention_mask: None) -> tuple[Tensor]:
        return (self.layer(hidden_states, attention_mask),)


def published_tower(modules, config: LlavaHrVisionConfig, weights: dict[str, Tensor], attention: str) -> nn.Module:
    """The published tower with weights of ours.

    Args:
        modules: as `published_modules` gives them.
        weights: of our tower, by name.
        attention: of its CLIP layers.
    Raises: ValueError naming tensors that would be left at random.
    """
    wrapper, clip, convnext = modules
    fast, slow = nn.Module(), nn.Module()
    fast.vision_tower = nn.Module()
    fast.vision_tower.vision_model = CLIPVisionModel._from_config(config.fast_config, attn_implementation=attention)
    embeddings = fast.vision_tower.vision_model.embeddings
    embeddings.forward = clip.forward_embeddings.__get__(embeddings)
    sizes = config.slow_config
    slow.vision_tower = convnext.ConvNeXt(
        depths=sizes.depths, dims=sizes.hidden_sizes, norm_eps=sizes.layer_norm_eps, num_classes=1
    )
    tower = wrapper.MultiPathCLIPVisionTower.__new__(wrapper.MultiPathCLIPVisionTower)
    nn.Module.__init__(tower)
    tower.fast_vision_tower, tower.slow_vision_tower = fast, slow
    tower.image_size, tower.enable_adapter = config.image_size, config.has_adapters
    widths = config.hidden_size, sizes.hidden_sizes[-1]
    tower.align_stages_latent = nn.ModuleList(wrapper.S2FStitchAlignModuleV2(*widths) for _ in config.adapter_layers)
    tower.align_stages = nn.ModuleList([wrapper.MultiPathAlignModule(*widths)])
    fill(tower, weights)
    layers = fast.vision_tower.vision_model.encoder.layers
    fast.vision_tower.vision_model.encoder.layers = nn.ModuleList(OldLayer(layer) for layer in layers)
    return tower.eval()


def fill(tower: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put our weights into the published tower, in its shapes.

    Raises: ValueError naming tensors that would be left at random.
    """
    own, taken = tower.state_dict(), {}
    for name, tensor in weights.items():
        published = published_name(f"model.vision_tower.{name}")
        if published == POSITIONS:
            tensor = torch.cat([tensor[:1] * 0, tensor])  # the row of the class token, which is cut off again
        published = published.removeprefix(TOWER)
        taken[published] = tensor.reshape(own[published].shape)
    missing, unexpected = tower.load_state_dict(taken, strict=False)
    if wrong := [name for name in missing if not any(part in f".{name}" for part in UNUSED)] + unexpected:
        raise ValueError(f"{listed(wrong)} of the published tower would be left at random: is it another version?")


# ------------------------------------------------------------------------------------------------------------ measuring


def random_tower(config: LlavaHrVisionConfig, seed: int) -> LlavaHrVisionModel:
    """Our tower with random weights; what is zero or nearly so at first is not, so that nothing is without effect."""
    torch.manual_seed(seed)
    tower = LlavaHrVisionModel(config).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith("layer_scale_parameter"):
                parameter.fill_(0.3)
            elif name.endswith("gate_2.bias"):
                parameter.fill_(0.5)
            elif name.startswith("adapters.") and name.endswith("weight"):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return tower


@torch.inference_mode()
def measure(towers: dict[str, Callable], pixels: Tensor, repeats: int) -> dict:
    """Times of all towers, taken by turns.

    Returns: per tower, seconds of a pass by the clock and of the processor (medians over repeats), and the largest
        difference of its features from the first one's.
    """
    expected = next(iter(towers.values()))(pixels)
    differences = {name: (run(pixels) - expected).abs().max().item() for name, run in towers.items()}
    seconds = {name: [] for name in towers}
    for number in range(repeats):
        order = list(towers.items())
        for name, run in order if number % 2 else reversed(order):
            start, used = now(pixels.device), time.process_time()
            run(pixels)
            seconds[name].append((now(pixels.device) - start, time.process_time() - used))
    return {
        name: {
            "seconds": median(wall for wall, _ in taken),
            "processor_seconds": median(used for _, used in taken),
            "difference": differences[name],
            "runs": [wall for wall, _ in taken],
        }
        for name, taken in seconds.items()
    }


def measure_size(modules, args: argparse.Namespace, image_size: int) -> dict:
    """Measures one setting.

    Raises: ValueError if the towers do not compute the same, so that their times would say nothing.
    """
    config = LlavaHrVisionConfig(image_size=image_size, slow_config=SLOW_TOWERS[args.slow])
    ours, dtype = random_tower(config, args.seed), getattr(torch, args.dtype)
    place = {"device": args.device, "dtype": dtype}
    towers = {"ours": lambda pixels: ours(pixels).last_hidden_state}
    for name, attention in PUBLISHED.items() if args.fused else [("published", PUBLISHED["published"])]:
        towers[name] = published_tower(modules, config, ours.state_dict(), attention).to(**place)
    ours.to(**place)
    pixels = torch.randn(args.batch_size, 3, image_size, image_size).to(**place)
    found = measure(towers, pixels, args.repeats)
    if args.dtype == "float32" and (worst := max(one["difference"] for one in found.values())) > TOLERANCE:
        raise ValueError(f"features differ by {worst:.2e} at {image_size} pixels, expected {TOLERANCE:.0e} at most")
    ratios = {
        name: {kind: one[kind] / found["ours"][kind] for kind in ("seconds", "processor_seconds")}
        for name, one in found.items()
        if name != "ours"
    }
    return {"image_size": image_size, "tokens": config.fast_grid**2, "towers": found, "published_over_ours": ratios}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    modules = published_modules(args.published)
    result = {
        "command": command_line("roe_llava.benchmarks.hr_frontend").replace(str(args.published), "DIR"),
        "machine": describe_machine(("roe-llava", "torch", "transformers", "timm")),
        "device": args.device,
        "gpu": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "slow_tower": args.slow,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "weights": "random",
        # On a processor others may use, too, the clock says little.
        "counted": "processor_seconds" if args.device == "cpu" else "seconds",
        "sizes": [],
    }
    for image_size in args.image_size:
        result["sizes"].append(measure_size(modules, args, image_size))
        print(line(result["sizes"][-1]), flush=True)
        replace_json(args.out, result)


def line(found: dict) -> str:
    """A setting's result as text."""
    parts = [f"{name} {one['seconds']:.3f} ({one['processor_seconds']:.3f}) s" for name, one in found["towers"].items()]
    ratio = found["published_over_ours"]["published"]
    return (
        f"{found['image_size']} px, {found['tokens']} tokens, by the clock (of the processor): {', '.join(parts)}; "
        f"published / ours {ratio['seconds']:.2f} ({ratio['processor_seconds']:.2f})"
    )


def speed_text(result: dict) -> str:
    """A result file as the paragraph of `docs/llava_hr.md`."""
    machine = result["machine"]
    counted = result["counted"]
    rows = [
        f"| {one['image_size']} px, {one['tokens']} tokens | {one['towers']['ours'][counted]:.2f} s "
        f"| {one['towers']['published'][counted]:.2f} s | {one['published_over_ours']['published'][counted]:.2f} |"
        for one in sorted(result["sizes"], key=lambda one: one["image_size"])
    ]
    worst = max(tower["difference"] for one in result["sizes"] for tower in one["towers"].values())
    place = result["gpu"] or f"{machine['processor']}, {result['threads']} thread(s)"
    head = "| image | here | published | published / here |"
    what = "the clock's" if counted == "seconds" else "the processor's, which others used, too"
    about = (
        f"One pass over a batch of {result['batch_size']}, {result['dtype']}, random weights of the published size "
        f"({result['slow_tower']} ConvNeXt), the same in both, by turns in one process; {place}, torch "
        f"{machine['torch']}, Transformers {machine['transformers']}, timm {machine['timm']}; median of "
        f"{result['repeats']}; seconds are {what}. Features differ by {worst:.0e} at most. "
        f"`benchmarks/results/{RESULT.name}`."
    )
    return "\n".join([head, "|---|---|---|---|", *rows, "", about])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--published", type=Path, required=True, metavar="DIR", help="checkout of the published code")
    parser.add_argument("--image-size", type=int, nargs="+", default=[384, 768, 1024])
    parser.add_argument("--slow", choices=SLOW_TOWERS, default="large", help="ConvNeXt-L (7B, 13B) or -XXL (X)")
    parser.add_argument("--fused", action="store_true", help="time the published tower with fused attention, too")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the processor; by default as PyTorch has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT, metavar="JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
