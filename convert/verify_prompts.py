"""What `verify` asks, and how it compares answers. Nothing is downloaded: the image is drawn.

S sequence, V vocabulary, N written tokens, L decoder layers.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from ..grafting_roe import share_tensors
from .bases import routed_kind
from .kinds import kind_of

# Question to how many images come with it.
PROMPTS = {
    "What is in this image?": 1,
    "How many shapes are there, and what colour is each of them? Explain how you know.": 1,
    "Is the circle to the left of the square? Answer yes or no.": 1,
    "What is different in the second image?": 2,
    "Name three things that are usually found in a kitchen.": 0,
}


def drawn_image(background: str = "white") -> Image.Image:
    """A red circle, a blue square and a green triangle, wider than high."""
    image = Image.new("RGB", (480, 360), background)
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 60, 180, 200), fill="red")
    draw.rectangle((260, 80, 400, 220), fill="blue")
    draw.polygon(((150, 330), (220, 230), (290, 330)), fill="green")
    return image


def prompt_text(processor, question: str, num_images: int) -> str:
    """A question as the model's chat template writes it; LLaVA-1.5's way where it has none."""
    if processor.chat_template is None:
        return f"USER: {(processor.image_token + chr(10)) * num_images}{question} ASSISTANT:"
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def encoded(processor, model, questions: list[str]):
    """Inputs of a left-padded batch, on the model's device and in its dtype."""
    processor.tokenizer.padding_side = "left"
    backgrounds = ("white", "lightgrey")
    images = [drawn_image(colour) for question in questions for colour in backgrounds[: PROMPTS[question]]]
    texts = [prompt_text(processor, question, PROMPTS[question]) for question in questions]
    inputs = processor(images=images or None, text=texts, padding=len(texts) > 1, return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def prompts_for(processor, model) -> dict:
    """Question to its inputs, one row each."""
    return {question: encoded(processor, model, [question]) for question in PROMPTS}


def batch_of(processor, model):
    """All questions as one batch."""
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return encoded(processor, model, list(PROMPTS))


@dataclass
class Answer:
    """What a model made of a prompt, or of a batch of them.

    Attributes:
        logits: (B, S, V) of the prompt, float32 on the CPU.
        steps: (B, N, V) that chose each token.
        tokens: N ids per row.
        routes: (B, L) bool; `None` for a stock model.
        margins: (B, L) how far each router was from deciding otherwise; `None` where none decided.
    """

    logits: Tensor
    steps: Tensor
    tokens: list[list[int]]
    routes: Tensor | None = None
    margins: Tensor | None = None

    def logit_difference(self, other: "Answer") -> float:
        """Largest absolute difference of the prompt's logits."""
        return (self.logits - other.logits).abs().max().item()

    def relative_difference(self, other: "Answer") -> float:
        """The same as a share of the largest logit."""
        return self.logit_difference(other) / max(finite_size(self.logits), torch.finfo(torch.float32).tiny)

    def rows(self) -> list["Answer"]:
        """One answer per row."""
        parts = [self.logits, self.steps, self.routes, self.margins]
        return [
            Answer(
                *(part if part is None else part[row : row + 1] for part in parts[:2]),
                [tokens],
                *(part if part is None else part[row : row + 1] for part in parts[2:]),
            )
            for row, tokens in enumerate(self.tokens)
        ]


def answer(model, inputs, num_tokens: int, **routing) -> Answer:
    """Greedy answer of exactly so many tokens, and the logits of the prompt.

    Args:
        routing: `routes` or `route_bias`, for a RoE model; `single_expert`, for one with experts.
    """
    outputs = model(**inputs, **routing)
    written = model.generate(
        **inputs,
        **routing,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    kind, logits = kind_of(model.config.model_type), getattr(outputs, "router_logits", None)
    routes_layers = kind is not None and kind.decides == "layers"  # of experts, routers say something else
    return Answer(
        outputs.logits.float().cpu(),
        torch.stack(written.logits, dim=1).float().cpu(),
        written.sequences[:, -num_tokens:].tolist(),
        getattr(outputs, "routes", None) if routes_layers else None,
        (logits[..., 0] - logits[..., 1]).abs().float().cpu() if routes_layers and logits is not None else None,
    )


def agreement(expected: Answer, found: Answer, rounding: float) -> tuple[bool, str]:
    """Whether two answers to one prompt agree up to rounding, and how that is said.

    Tokens may part where the two best logits were so close that rounding decides; a route likewise where a router was.

    Args:
        rounding: allowed difference as a share of the largest logit.
    """
    if expected.routes is not None and found.routes is not None and not torch.equal(expected.routes, found.routes):
        margin = expected.margins[expected.routes.cpu() != found.routes.cpu()].min().item()
        return margin < rounding, f"another route, where a router was {margin:.2g} from deciding so"
    allowed = rounding * finite_size(expected.steps)
    for step, (ours, theirs) in enumerate(zip(expected.tokens[0], found.tokens[0], strict=True)):
        one, other = expected.steps[0, step], found.steps[0, step]
        if one.isnan().any() or other.isnan().any():
            return False, f"logits of token {step} hold NaN"
        apart = (one - other).abs().nan_to_num(nan=0.0, posinf=float("inf"))  # a suppressed token has -inf in both
        if apart.max().item() > allowed:
            return False, f"logits of token {step} are {apart.max().item():.2g} apart, allowed {allowed:.2g}"
        if ours != theirs:
            gap = (expected.steps[0, step, ours] - expected.steps[0, step, theirs]).abs().item()
            return gap <= allowed, f"tokens part at number {step}, where the two best are {gap:.2g} apart"
    return True, "same tokens"


def finite_size(logits: Tensor) -> float:
    """The largest absolute value that is finite; 0 where none is."""
    return logits.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max().item()


class RanLayers:
    """Which decoder layers' attention and MLP were called."""

    def __init__(self, num_layers: int):
        self.attention, self.mlp = [False] * num_layers, [False] * num_layers

    def layers(self) -> list[bool]:
        """One bool per layer.

        Raises: ValueError if half a layer ran.
        """
        if self.attention != self.mlp:
            raise ValueError(f"layers ran by half: attention in {self.attention}, MLP in {self.mlp}")
        return self.attention


@contextmanager
def executed_layers(model):
    """Watch which layers run within the block."""
    layers = model.model.language_model.layers
    ran = RanLayers(len(layers))

    def marker(marks, index):
        def mark(*_):
            marks[index] = True

        return mark

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.self_attn.register_forward_pre_hook(marker(ran.attention, index)))
        handles.append(layer.mlp.register_forward_pre_hook(marker(ran.mlp, index)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def stock_twin(model) -> LlavaForConditionalGeneration:
    """A stock model on the tensors of a RoE model."""
    content = {name: value for name, value in model.config.to_dict().items() if name != "auto_map"}
    cls = routed_kind(content).base_class(content)
    config = cls.config_class.from_dict(content | {"model_type": cls.config_class.model_type, "architectures": None})
    with torch.device("meta"):
        twin = cls._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    share_tensors(twin, model)
    return twin.eval()
