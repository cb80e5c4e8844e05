"""`roe-llava verify BASE [ROE]`: what there is to know of a model before trusting it, checked on the weights at hand.

Every check gives one line. The stock model answers the prompts first; then the RoE model, whose answers have to be the
same with every layer kept; then the RoE model with its own routes, which have to be followed. Only one copy of the
base's weights is in memory at a time.
"""

import gc
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoProcessor

from ..benchmarks.environment import describe_machine
from ..benchmarks.timing import compare_times
from ..grafting_roe import no_warning_of_missing_parts
from . import verify_experts
from .adapter_file import ABOUT_NAME
from .bases import routed_kind
from .completeness import check_complete
from .fingerprint import base_signatures, base_tensors, fingerprint
from .folder_files import no_warning_of_types, read_base_config
from .kinds import Kind, kind_of
from .original_processor import read_generation_config
from .output import write_json
from .routing_parts import byte_progress, open_routing_parts
from .source import Source, read_json, resolve_source
from .state_dict import difference, listed
from .upcycle import read_dense_config
from .verify_prompts import Answer, agreement, answer, batch_of, executed_layers, prompts_for, stock_twin
from .weights import open_checkpoint

# Largest difference of logits, as a share of the largest logit, that rounding alone explains where routing tokens ride
# along: matrices have two rows more, which changes the order of additions.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Verdict:
    """The outcome of one check.

    Attributes:
        check: what was checked.
        passed: whether it is as it should be.
        detail: what was found.
    """

    check: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.check}: {self.detail}"


@dataclass
class Report:
    """All outcomes.

    Attributes:
        verdicts: in the order of the checks.
        routes: prompt to "1101..." (1: the layer runs), with the model's own routes.
        times: as `compare_times` gives them; `None` if nothing was timed.
        setup: device, dtype, versions.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    routes: dict[str, str] = field(default_factory=dict)
    times: dict | None = None
    setup: dict = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    def add(self, check: str, passed: bool, detail: str, show) -> None:
        self.verdicts.append(Verdict(check, bool(passed), detail))
        show(self.verdicts[-1])


@torch.inference_mode()
def verify(
    base: str | Path,
    roe: str | Path | None = None,
    *,
    revision: str | None = None,
    roe_revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    num_tokens: int = 16,
    repeats: int = 5,
    show=print,
) -> Report:
    """Check a base, or a base and the routing parts made for it.

    Args:
        base: llava-hf checkpoint, a folder or a Hub id.
        roe: adapter file or RoE checkpoint, likewise; or a model with experts that is upcycled and untrained. Without
            one, untrained routing parts stand in, and what depends on trained ones is left out.
        revision, roe_revision: of Hub ids.
        device: of torch; "auto" takes an accelerator if there is one.
        dtype: "float32", "bfloat16", ...; "auto" takes the one the base is stored in.
        num_tokens: written per prompt.
        repeats: timed runs per prompt and model; 0 to time nothing.
        show: called with each verdict as it comes.
    Returns: the report.
    Raises: ValueError if a checkpoint cannot be opened at all, or has experts that need not answer as the base does.
    """
    check_options(dtype, num_tokens, repeats)
    if roe is None and roe_revision is not None:
        raise ValueError(f"roe_revision {roe_revision!r} without routing parts: name them behind the base")
    device = default_device() if device == "auto" else checked_device(device)
    base_source = resolve_source(base, revision)
    roe_source = None if roe is None else resolve_source(roe, roe_revision)
    kind = None if roe_source is None or is_adapter(roe_source) else kind_of(verify_experts.kind_at(roe_source.folder))
    has_experts = kind is not None and kind.decides == "experts"
    # Other decoders may have experts than can be routed.
    config = (read_dense_config if has_experts else read_base_config)(base_source.folder)
    read_generation_config(base_source.folder)
    check_complete(open_checkpoint(base_source.folder).tensors, config, base_source.folder)
    report = Report(setup={"device": device, "dtype": dtype, **describe_machine()})
    if has_experts:
        moe_config = verify_experts.check_untrained(roe_source, base_source, kind)
        verify_experts.check_copies(report, base_source, roe_source, moe_config, show)
    elif roe_source is not None:
        check_bytes(report, base_source, roe_source, show)
    processor = load_processor(base_source, routed_kind(config).open_config(config).image_token_id)
    stock = load_stock(base_source, dtype, device)
    prompts = prompts_for(processor, stock)
    expected = {name: answer(stock, inputs, num_tokens) for name, inputs in prompts.items()}
    check_answers(expected, base_source, stock.dtype)
    if has_experts:
        verify_with_experts(report, roe_source, kind, stock, processor, prompts, expected, num_tokens, repeats, show)
        return report
    if roe_source is None or not is_adapter(roe_source):
        stock = free(stock)
    model = load_roe(base_source, roe_source, stock, dtype, device)
    check_all_kept(report, model, prompts, expected, num_tokens, show)
    if roe_source is not None:
        check_routes(report, model, prompts, num_tokens, show)
        check_batch(report, model, processor, prompts, num_tokens, show)
    if repeats:
        # What untrained routers decide says nothing: with them, the cost of routing alone is measured.
        routing = {} if roe_source is not None else {"route_bias": float("inf")}
        time_both(report, model, stock or stock_twin(model), prompts, num_tokens, repeats, routing, show)
    return report


def verify_with_experts(
    report: Report, moe: Source, kind: Kind, stock, processor, prompts, expected, num_tokens: int, repeats: int, show
) -> None:
    """All that is checked of a model with experts once the stock model has answered."""
    device, dtype = stock.device, stock.dtype
    if not repeats:
        free(stock)
    model = verify_experts.load(moe, kind, dtype, device)
    verify_experts.check_answers(report, model, prompts, expected, num_tokens, ROUNDING[model.dtype], show)
    check_batch(report, model, processor, prompts, num_tokens, show)
    if repeats:
        verify_experts.time_both(report, model, stock, prompts, num_tokens, repeats, show)


def check_options(dtype: str, num_tokens: int, repeats: int) -> None:
    """Raises: ValueError naming an option that is out of range."""
    names = [str(one).removeprefix("torch.") for one in ROUNDING]
    if dtype not in ("auto", *names):
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(names)}, got {dtype!r}")
    if num_tokens < 1:
        raise ValueError(f"the number of tokens to write must be 1 or more, got {num_tokens}")
    if repeats < 0:
        raise ValueError(f"repeats must be 0 (nothing is timed) or more, got {repeats}")


def checked_device(device: str) -> str:
    """A device by the name torch has for it.

    Raises: ValueError if there is none here.
    """
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("meta tensors have no values")
        torch.zeros(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device {device!r} cannot be used here: {reason} (expected 'auto', 'cpu', or an accelerator of this "
            "machine that this PyTorch was built for)"
        ) from error
    return device


def check_answers(answers: dict[str, Answer], base: Source, dtype: torch.dtype) -> None:
    """Raises: ValueError if the stock model answers with numbers that cannot be compared."""
    for question, found in answers.items():
        if not torch.isfinite(found.logits).all() or found.steps.isnan().any():
            raise ValueError(
                f"the stock model in {base.folder} answers {question!r} with logits that are NaN or Inf, expected "
                f"finite ones: are there NaN among its weights, or too large values for {dtype} (give another --dtype)?"
            )


def default_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def free(model) -> None:
    """Give a model's memory back before another one takes as much; nothing may hold on to it."""
    model.to("meta")
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def load_processor(base: Source, image_token: int):
    """The base's processor.

    Args:
        image_token: id of the image token in the base's config.
    Raises: ValueError if it has none, or one that writes another image token.
    """
    try:
        # Without the folder's code, about which Transformers would ask where the front-end is of ours.
        with no_warning_of_types():
            processor = AutoProcessor.from_pretrained(base.folder, trust_remote_code=False)
        found = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    except Exception as error:  # whatever the libraries below make of a damaged file
        raise ValueError(
            f"{base.folder} has no processor that opens ({type(error).__name__}: {error}): there is nothing to ask with"
        ) from error
    if found != image_token:
        raise ValueError(
            f"the tokenizer in {base.folder} gives {processor.image_token!r} id {found}, config.json has "
            f"image_token_index {image_token}: do they belong together?"
        )
    return processor


def load_stock(base: Source, dtype: str, device: str):
    """The stock model.

    Raises: ValueError if a weight of it would be made up.
    """
    config = read_json(base.folder / "config.json")
    cls = routed_kind(config).base_class(config)
    model, info = cls.from_pretrained(base.folder, dtype=dtype, output_loading_info=True)
    if wrong := [name for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for name in info[kind]]:
        raise ValueError(
            f"{base.folder} does not load as a whole: {listed(sorted(map(str, wrong)))} is missing, unknown or of "
            "another shape for Transformers"
        )
    return model.to(device).eval()


def is_adapter(roe: Source) -> bool:
    return (roe.folder / ABOUT_NAME).is_file()


def load_roe(base: Source, roe: Source | None, stock, dtype: str, device: str):
    """The RoE model: from its own folder, around the stock model (compared on the disk before), or untrained."""
    cls = routed_kind(read_json(base.folder / "config.json")).model
    if stock is not None:
        return cls.from_base(stock, roe.folder, check_base=False)
    if roe is not None:
        return cls.from_pretrained(roe.folder, dtype=dtype).to(device).eval()
    with no_warning_of_missing_parts():
        model, _ = cls._load(base.folder, dtype=dtype)
    return model.to(device).eval()


def check_bytes(report: Report, base: Source, roe: Source, show) -> None:
    """Whether the weights under the routing parts are the base's, to the byte, as stored."""
    parts = open_routing_parts(roe)
    if parts.checkpoint is not None:
        check_complete(parts.checkpoint.tensors, read_json(roe.folder / "config.json"), roe.folder)
    with byte_progress(sum(t.num_bytes for t in base_tensors(open_checkpoint(base.folder)).values()), "base") as bar:
        found = base_signatures(open_checkpoint(base.folder), bar)
    if parts.checkpoint is not None:
        name = "the graft left the base's bytes alone"
        with byte_progress(sum(t.num_bytes for t in base_tensors(parts.checkpoint).values()), "RoE") as bar:
            expected = base_signatures(parts.checkpoint, bar)
    else:
        name = "the adapter was trained on this base"
        expected = (parts.info.base or {}).get("tensors")
        if not expected:
            report.add(name, False, "the adapter does not say which base that was", show)
            return
    reason = difference(found, expected)
    detail = f"{len(found)} tensors, fingerprint {fingerprint(found)[:16]}" if reason is None else reason
    report.add(name, reason is None, detail, show)


def check_all_kept(report: Report, model, prompts: dict, expected: dict[str, Answer], num_tokens: int, show) -> None:
    """Whether the model is the stock model as long as no layer is skipped."""
    layers = model.config.text_config.num_hidden_layers
    pinned = {name: answer(model, inputs, num_tokens, routes=[[True] * layers]) for name, inputs in prompts.items()}
    worst = largest(expected[name].logit_difference(pinned[name]) for name in prompts)
    same = sum(expected[name].tokens == pinned[name].tokens for name in prompts)
    report.add(
        "every layer kept by routes= equals the stock model",
        worst == 0 and same == len(prompts),
        f"largest logit difference {worst:.3g}, expected 0; the same {num_tokens} tokens for {same} of {len(prompts)}",
        show,
    )
    biased = {name: answer(model, inputs, num_tokens, route_bias=float("inf")) for name, inputs in prompts.items()}
    verdicts = {name: agreement(expected[name], biased[name], ROUNDING[model.dtype]) for name in prompts}
    worst = largest(expected[name].relative_difference(biased[name]) for name in prompts)
    report.add(
        "routers at work, every layer kept, equals the stock model up to rounding",
        all(passed for passed, _ in verdicts.values()),
        f"largest logit difference {worst:.2g} of the largest logit, allowed {ROUNDING[model.dtype]:.0g}; "
        + counted(text for _, text in verdicts.values()),
        show,
    )


def counted(texts) -> str:
    """How many prompts each thing is so for."""
    return "; ".join(f"{number} of the prompts: {text}" for text, number in Counter(texts).items())


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers; NaN if one of them is, which `max` may pass over."""
    return torch.tensor(list(values)).max().item()


def check_routes(report: Report, model, prompts: dict, num_tokens: int, show) -> None:
    """Which layers the model's own routes skip, and whether those layers really do not run."""
    wrong, skipped = [], 0.0
    for name, inputs in prompts.items():
        with executed_layers(model) as ran:
            found = answer(model, inputs, num_tokens)
        report.routes[name] = "".join("01"[keep] for keep in found.routes[0].tolist())
        if ran.layers() != found.routes[0].tolist():
            wrong.append(name)
        skipped += 1 - found.routes.float().mean().item()
    report.add(
        "a skipped layer does not run",
        not wrong,
        "attention and MLP of every skipped layer were never called, in prefill and decoding"
        if not wrong
        else f"layers ran that the route skips, or the other way round, for {', '.join(wrong)}",
        show,
    )
    num_routes = len(set(report.routes.values()))
    report.add(
        "layers are skipped",
        skipped > 0,
        f"{skipped / len(prompts):.1%} of the layers on {len(prompts)} prompts, {num_routes} different routes"
        if skipped
        else "every layer runs for every prompt: nothing is saved (lower route_bias skips more)",
        show,
    )


def check_batch(report: Report, model, processor, prompts: dict, num_tokens: int, show) -> None:
    """Whether a prompt in a left-padded batch gets the answer it gets alone."""
    inputs = batch_of(processor, model)
    rows = answer(model, inputs, num_tokens).rows()
    alone = [answer(model, one, num_tokens) for one in prompts.values()]
    verdicts = [agreement(one, row, ROUNDING[model.dtype]) for one, row in zip(alone, rows, strict=True)]
    report.add(
        "a prompt in a batch equals the prompt alone",
        all(passed for passed, _ in verdicts),
        counted(text for _, text in verdicts),
        show,
    )


def time_both(report: Report, model, stock, prompts: dict, num_tokens: int, repeats: int, routing: dict, show) -> None:
    """Time of the RoE model against the stock model on the same tensors: a measurement, which nothing can fail."""
    pairs = [(inputs, inputs | routing) for inputs in prompts.values()]
    report.times = times = compare_times(stock, model, pairs, num_tokens, repeats)
    parts = ", ".join(
        f"{part} {times[part]['roe_seconds'] * 1e3:.1f} ms ({times[part]['ratio']:.2f}x of the base's speed, "
        f"ceiling {times[part]['ceiling']:.2f}x)"
        for part in ("prefill", "decode")
    )
    skipped = "every layer kept" if routing else f"{times['skip_ratio']:.1%} of the layers skipped"
    report.add("time against the base, batch 1", True, f"{parts}; {skipped}", show)


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("base", metavar="BASE", help="llava-hf checkpoint: a folder or a Hub id")
    parser.add_argument(
        "roe", metavar="ROE", nargs="?", help="what was made of it: adapter folder, RoE checkpoint, upcycled model"
    )
    parser.add_argument("--revision", help="revision of BASE on the Hub")
    parser.add_argument("--roe-revision", help="revision of ROE on the Hub")
    parser.add_argument("--device", default="auto", help="torch device (%(default)s: an accelerator if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (%(default)s: as stored)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens written per prompt (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; 0 to time nothing (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")


def run(args) -> int:
    """Run the command; 1 if a check failed."""
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {args.json} is a folder or in none, expected a file in a folder that is there")
    report = verify(
        args.base,
        args.roe,
        revision=args.revision,
        roe_revision=args.roe_revision,
        device=args.device,
        dtype=args.dtype,
        num_tokens=args.tokens,
        repeats=args.repeats,
    )
    for prompt, route in report.routes.items():
        print(f"      {route}  {prompt}")
    if args.json is not None:
        write_json(args.json, asdict(report) | {"passed": report.passed})
    print(f"{sum(v.passed for v in report.verdicts)} of {len(report.verdicts)} checks passed")
    return 0 if report.passed else 1
