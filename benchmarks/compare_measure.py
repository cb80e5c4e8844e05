"""What `compare` measures of a trained system: accuracy, parameters, FLOPs, how alike experts are, where tokens go.

N tokens, L decoder layers, M layers with experts, E experts, K experts per token, D hidden.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import log
from statistics import mean

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchFeature, PreTrainedModel

from ..examples.tiny_world.asking import prompts
from ..examples.tiny_world.evaluate import accuracy_by_family, family_examples
from ..examples.tiny_world.train_roe import evaluate, route_shares
from ..examples.tiny_world.world import FAMILIES, messages
from ..modeling_moe_llava import MoeBlock
from ..training.data import ChatCollator
from ..training.train_moe import WithoutSegments
from .compare_systems import ROUTED, WITH_EXPERTS, Trained

COUNTED_PER_FAMILY = 3  # questions whose FLOPs are counted, and whose times are taken
WATCHED_PER_FAMILY = 25  # questions on whose tokens experts are compared
CURVE = "token_loss"


def judged(method: str, trained: Trained, per_family: int, control_per_family: int) -> dict:
    """Everything of a run but its times, as JSON has it.

    Args:
        per_family: test questions per family.
        control_per_family: fewer of them, for routers turned round and single experts.
    """
    found = accuracy(method, trained, per_family)
    taken = found.pop("taken", None)
    share = None if taken is None else torch.cat([*taken.values()]).float().mean(dim=0).tolist()
    if taken is not None:
        found["routes"] = route_shares(taken)
    result = found | {"learned": trained.learned, "more": trained.more, "curve": curve(trained)}
    result |= {"minutes": trained.seconds / 60, "cpu_minutes": trained.cpu_seconds / 60}
    result["parameters"] = parameters(method, trained, share)
    result["flops"] = mean_flops(trained)
    if method in WITH_EXPERTS and method not in ROUTED:  # whose experts see other tokens in every layer
        result["experts"] = experts(trained, control_per_family)
    return result


def curve(trained: Trained) -> list[list[float]]:
    """[step, token loss in nats] pairs of a training; with experts the balancing loss is in it."""
    name = CURVE if any(CURVE in entry for entry in trained.log) else "loss"
    return [[entry["step"], entry[name]] for entry in trained.log if name in entry]


# ------------------------------------------------------------------------------------------------------------ accuracy


def accuracy(method: str, trained: Trained, per_family: int, **generate_kwargs) -> dict:
    """Exact match on test questions; with `taken` routes where the model is RoE-LLaVA's."""
    if method in ROUTED:
        return evaluate(trained.model, trained.processor, per_family, "test", trained.routes)
    by_family = accuracy_by_family(trained.model, trained.processor, per_family, **generate_kwargs)
    return {"accuracy": mean(by_family.values()), "accuracy_by_family": by_family, "skip_ratio": 0.0}


@torch.inference_mode()
def validation_loss(trained: Trained, per_family: int) -> float:
    """Token loss in nats on validation questions, mean over families; of a model that computes one itself."""
    collate = WithoutSegments(ChatCollator(trained.writer, messages))
    trained.model.eval()
    losses = [trained.model(**collate(family_examples(one, per_family, "validation"))).loss for one in FAMILIES]
    return torch.stack(losses).mean().item()


# ---------------------------------------------------------------------------------------------------------- parameters


def parameters(method: str, trained: Trained, kept: Sequence[float] | None) -> dict:
    """Parameters that are there, and that a token of an answer goes through, vision tower and embeddings included.

    Args:
        kept: share of the questions that keep each layer, of a RoE-LLaVA.
    Returns: `total`, without what nothing ever reads, and `activated`, mean over questions.
    """
    model = trained.model
    total = sum(one.numel() for one in model.parameters())
    if method not in ROUTED:
        return {"total": total, "activated": total - sum(idle_in_experts(model).values())}
    if method == "dense_adapters":
        total -= routing_parameters(model)
        return {"total": total, "activated": total}
    layers = model.model.language_model.layers
    full, skip = zip(*map(path_sizes, layers), strict=True)
    idle = idle_in_experts(model)
    full = [size - idle.get(layer, 0) for layer, size in enumerate(full)]
    rest = total - sum(sum(one.numel() for one in layer.parameters()) for layer in layers)
    routers = sum(one.numel() for layer in layers for one in layer.router.parameters())
    activated = sum(share * a + (1 - share) * b for share, a, b in zip(kept, full, skip, strict=True))
    if trained.routes is None:
        return {"total": total, "activated": rest + routers + activated}
    rest -= routing_parameters(model) - routers  # nothing is decided
    return {"total": rest + activated, "activated": rest + activated}


def path_sizes(layer: nn.Module) -> tuple[int, int]:
    """Parameters of a routed layer that runs, and of what stands in for it: the adapter and the norm before it."""
    sizes = {name: one.numel() for name, one in layer.named_parameters()}
    full = sum(size for name, size in sizes.items() if not name.startswith(("adapter.", "router.")))
    return full, sum(size for name, size in sizes.items() if name.startswith(("adapter.", "input_layernorm.")))


def routing_parameters(model: PreTrainedModel) -> int:
    """Parameters of routers and routing tokens."""
    language_model = model.model.language_model
    routers = [one for layer in language_model.layers if layer.router is not None for one in layer.router.parameters()]
    return sum(one.numel() for one in [*routers, *language_model.routing_tokens.parameters()])


def idle_in_experts(model: PreTrainedModel) -> dict[int, int]:
    """Layer -> parameters that a text token does not go through: experts not chosen, the images' hypernetwork."""
    config, found = model.config, {}
    for layer, block in blocks(model).items():
        one_expert = sum(one[0].numel() for one in block.experts.parameters())
        found[layer] = one_expert * (config.num_experts - config.num_experts_per_tok)
        if config.router_type == "token_aware":
            found[layer] += sum(one.numel() for one in block.router.image.parameters())
    return found


# --------------------------------------------------------------------------------------------------------------- FLOPs


def counted_prompts(trained: Trained) -> list[BatchFeature]:
    """Inputs of single test questions, as many of every family."""
    examples = [one for family in FAMILIES for one in family_examples(family, COUNTED_PER_FAMILY)]
    return [prompts(trained.processor, [one]) for one in examples]


def requested(trained: Trained, prompt: BatchFeature) -> dict:
    """A prompt as the arguments that a system's prefill takes."""
    if hasattr(trained.model.config, "adapter_size"):
        return {**prompt} | ({} if trained.routes is None else {"routes": trained.routes})
    return {name: value for name, value in prompt.items() if name != "routing_segments"}


def mean_flops(trained: Trained) -> dict:
    """FLOPs of the decoder, mean over test questions, with learned routes; a multiplication with its addition are two.

    Returns: `prefill_per_token`: of a prefill, over its prompt's tokens. `decode_per_token`: of one token behind it,
        with the head. `formula_per_token`: the latter by `decode_flops`.
    """
    found = [flops(trained, prompt) for prompt in counted_prompts(trained)]
    return {name: mean(one[name] for one in found) for name in found[0]}


@torch.inference_mode()
def flops(trained: Trained, prompt: BatchFeature) -> dict:
    """See `mean_flops`; of one prompt."""
    model, length = trained.model.eval(), prompt["input_ids"].shape[1]
    with countable(model):
        with FlopCounterMode(display=False) as counter:
            outputs = model(**requested(trained, prompt), use_cache=True, logits_to_keep=1)
        of_modules = counter.get_flop_counts()
        decoder = next(counts for name, counts in of_modules.items() if name.endswith("model.language_model"))
        with FlopCounterMode(display=False) as counter:
            model(
                input_ids=prompt["input_ids"][:, -1:],
                past_key_values=outputs.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
    routes = getattr(outputs, "routes", None)
    return {
        "prefill_per_token": sum(decoder.values()) / length,
        "decode_per_token": counter.get_total_flops(),
        "formula_per_token": decode_flops(trained, length + 1, None if routes is None else routes[0]),
    }


@contextmanager
def countable(model: PreTrainedModel) -> Iterator[None]:
    """While the block lasts a model computes with what torch's counter knows: plain matrix products."""
    attention, implementation = (
        model.config._attn_implementation,
        getattr(model.config, "_experts_implementation", None),
    )
    model.set_attn_implementation("eager")
    if has_experts(model):
        model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if has_experts(model):
            model.set_experts_implementation(implementation)


def decode_flops(trained: Trained, keys: int, route: Tensor | None = None) -> int:
    """FLOPs of one decoded token by the sizes of the model: twice its matrices' entries, and attention over `keys`.

    Args:
        keys: tokens that attention reads, the new one among them.
        route: (L,) bool of a RoE-LLaVA.
    """
    config = trained.model.config
    text, total = config.text_config, 0
    heads, pairs = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    attention = 2 * text.hidden_size * (2 * heads + 2 * pairs) + 2 * 2 * heads * keys
    mlp = 2 * 3 * text.hidden_size * text.intermediate_size
    adapter = 2 * 2 * text.hidden_size * getattr(config, "adapter_size", 0)
    beside = has_adapters_beside(trained.model)
    with_experts = config.expert_layers() if has_experts(trained.model) else ()
    for layer in range(text.num_hidden_layers):
        if route is not None and not route[layer]:
            total += adapter
            continue
        total += attention + (adapter if beside else 0)
        total += mlp * config.num_experts_per_tok + router_flops(config) if layer in with_experts else mlp
    return total + 2 * text.hidden_size * text.vocab_size


def router_flops(config) -> int:
    """FLOPs of choosing one token's experts; the sums of a token-aware router's entries are not counted."""
    width = config.text_config.hidden_size
    if config.router_type == "linear":
        return 2 * width * config.num_experts
    inner, rank, out = config.router_hidden_size, config.router_rank, config.router_width
    made = width * 2 * rank * (inner + 1) + rank * out * (inner + 1)
    return 2 * (width * inner + made + out * config.num_experts)


def has_experts(model: PreTrainedModel) -> bool:
    return bool(blocks(model))


def has_adapters_beside(model: PreTrainedModel) -> bool:
    """Whether `put_adapters_beside` was here: it leaves hooks."""
    return any(layer._forward_hooks for layer in model.model.language_model.layers)


# ------------------------------------------------------------------------------------------------------------- experts


def blocks(model: PreTrainedModel) -> dict[int, MoeBlock]:
    """Layer number -> its block of experts."""
    layers = enumerate(model.model.language_model.layers)
    return {number: layer.mlp for number, layer in layers if isinstance(layer.mlp, MoeBlock)}


@torch.inference_mode()
def experts(trained: Trained, per_family: int) -> dict:
    """What EvoMoE says of MoE-LLaVA: are experts alike, and do routers tell tokens apart?

    Args:
        per_family: test questions of the controls.
    Returns: `layers`, a dict per layer with experts, see `similarity` and `usage`; and accuracy on the same questions
        as `routed`, `rotated` (every token's experts are the next ones in number) and `single`, a list: all tokens
        through one expert.
    """
    model = trained.model.eval()
    seen, routing, is_image = watch(trained)
    found = []
    for number, (layer, block) in enumerate(blocks(model).items()):
        logits, chosen = routing[number]
        row = {"layer": layer} | similarity(block, trained.started[number], seen[layer])
        found.append(row | usage(logits, chosen, is_image, model.config.num_experts))

    def score(**kwargs) -> float:
        return mean(accuracy_by_family(model, trained.processor, per_family, **kwargs).values())

    scores = {"routed": score()}
    with rotated(model):
        scores["rotated"] = score()
    scores["single"] = [score(single_expert=number) for number in range(model.config.num_experts)]
    return {"layers": found, "accuracy": scores}


@torch.inference_mode()
def modalities_apart(trained: Trained) -> float:
    """`apart` of `usage`, mean over layers with experts."""
    trained.model.eval()
    _, routing, is_image = watch(trained)
    number = trained.model.config.num_experts
    return mean(usage(logits, chosen, is_image, number)["apart"] for logits, chosen in routing)


def watch(trained: Trained) -> tuple[dict[int, Tensor], list[tuple[Tensor, Tensor]], Tensor]:
    """The tokens of test prompts in the layers with experts.

    Returns: layer -> (N, D) what enters its experts; per layer router logits (N, E) and chosen experts (N, K); (N,)
        bool, tokens that stand for parts of an image.
    """
    model, seen, handles = trained.model, {}, []
    for layer, block in blocks(model).items():
        seen[layer] = []
        handles.append(block.register_forward_pre_hook(lambda _, args, to=seen[layer]: to.append(args[0])))
    rows, real, images = [], [], []
    for family in FAMILIES:
        prompt = requested(trained, prompts(trained.processor, family_examples(family, WATCHED_PER_FAMILY)))
        outputs = model(**prompt, output_router_logits=True, use_cache=False)
        rows.append((outputs.router_logits, outputs.expert_indices))
        real.append(prompt["attention_mask"].bool())
        images.append((prompt["input_ids"] == model.config.image_token_id)[real[-1]])
    for handle in handles:
        handle.remove()
    states = {
        layer: torch.cat([one[mask] for one, mask in zip(many, real, strict=True)]) for layer, many in seen.items()
    }
    routing = []
    for number in range(len(seen)):
        parts = [[row[kind][number][mask] for row, mask in zip(rows, real, strict=True)] for kind in range(2)]
        routing.append((torch.cat(parts[0]), torch.cat(parts[1])))
    return states, routing, torch.cat(images)


def similarity(block: MoeBlock, started: list[Tensor], tokens: Tensor) -> dict:
    """Mean cosine between the experts of a layer, over all pairs.

    Args:
        started: packed parameters before they learned.
        tokens: (N, D) that enter the layer's experts.
    Returns: of their `weights`; of what these `moved` since the experts were copies of one; of their `outputs` for
        the same token, mean over tokens.
    """
    now = torch.cat([one.flatten(1) for one in block.experts.parameters()], dim=1)
    moved = now - torch.cat([one.flatten(1) for one in started], dim=1)
    outputs = torch.stack([block.experts.expert(number, tokens) for number in range(len(now))])
    return {"weights": cosine(now), "moved": cosine(moved), "outputs": cosine(outputs)}


def cosine(vectors: Tensor) -> float:
    """Mean over pairs of (E, ...) vectors, and over what lies between first and last dimension."""
    pairs = itertools.combinations(range(len(vectors)), 2)
    return mean(torch.cosine_similarity(vectors[a], vectors[b], dim=-1).mean().item() for a, b in pairs)


def usage(logits: Tensor, chosen: Tensor, is_image: Tensor, num_experts: int) -> dict:
    """Where a layer's tokens go, by modality.

    Args:
        logits: (N, E).
        chosen: (N, K).
        is_image: (N,) bool.
    Returns: `image` and `text`: share of their choices that goes to each expert. `apart`: half the sum of the absolute
        differences of the two, 0 where modality is of no account and 1 where no expert serves both. `differ`: chance
        that two tokens of one modality have another first choice, mean over modalities. `undecided`: mean entropy of
        the routers' probabilities over that of even ones.
    """
    parts = {"image": is_image, "text": ~is_image}
    shares = {name: share_of(chosen[rows], num_experts) for name, rows in parts.items()}
    first = [share_of(chosen[rows, :1], num_experts) for rows in parts.values()]
    probabilities = logits.softmax(dim=-1)
    entropy = -(probabilities * probabilities.clamp(min=1e-12).log()).sum(dim=-1).mean().item()
    return {
        **{name: share.tolist() for name, share in shares.items()},
        "apart": (shares["image"] - shares["text"]).abs().sum().item() / 2,
        "differ": mean(1 - (share**2).sum().item() for share in first),
        "undecided": entropy / log(num_experts),
    }


def share_of(chosen: Tensor, num_experts: int) -> Tensor:
    """(E,) share of the choices that is each expert's."""
    return torch.bincount(chosen.flatten(), minlength=num_experts).double() / chosen.numel()


@contextmanager
def rotated(model: PreTrainedModel) -> Iterator[None]:
    """While the block lasts, every router's choice means the expert with the next number."""
    weights = [getattr(block.router, "score", block.router).weight for block in blocks(model).values()]
    with torch.no_grad():
        for one in weights:
            one.copy_(one.roll(1, dims=0))
    try:
        yield
    finally:
        with torch.no_grad():
            for one in weights:
                one.copy_(one.roll(-1, dims=0))


__all__ = ["judged", "mean_flops", "modalities_apart", "validation_loss"]
