"""The page of `compare`: tables in markdown and three pictures, all from its JSON."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ..display.drawing import FAINT, INK, KEPT, WRONG
from .compare_speed import TOKENS, fastest
from .compare_summary import LEAST_POINTS, answer_ratio, shown_methods
from .compare_systems import METHODS
from .quality_report import new_figure, percent, table

LABELS = {
    "base": "base, untrained",
    "dense_mlps": "dense, the same MLPs trained",
    "roe": "RoE (ours, taught, 30 %)",
    "static": "the same layers dropped for all",
    "moe_llava": "MoE-LLaVA, 4 experts, top-2",
    "evomoe": "EvoMoE, 4 experts, top-1",
    "roe_moe": "RoE on MoE-LLaVA",
    "dense_all": "dense, all but the vision tower trained",
    "dense_adapters": "dense, adapters beside",
    "moe_warmed": "EvoMoE's warm-up, then MoE-LLaVA",
    "evomoe_other": "EvoMoE, the other weight",
}
COLORS = {
    "base": INK,
    "dense_mlps": "#777777",
    "roe": KEPT,
    "static": WRONG,
    "moe_llava": "#009E73",
    "evomoe": "#CC79A7",
    "roe_moe": "#56B4E9",
    "dense_all": "#999999",
    "dense_adapters": "#BBBBBB",
    "moe_warmed": "#66C2A5",
    "evomoe_other": "#E7B6D1",
}

BESIDE = {
    "roe": "routes searched and measured (forward passes), skip ratio settled on validation questions",
    "static": "RoE's search",
    "moe_llava": "its MLPs copied into experts",
    "roe_moe": "as MoE-LLaVA for a third of the steps, then as RoE",
    "evomoe": "its MLPs copied into experts after the warm-up; three schedules",
}

PAGE = """# RoE, MoE-LLaVA and EvoMoE side by side

Made by `{command}` ({minutes:.0f} minutes of training, {cpu_minutes:.0f} of them on the processor; {num_seeds} seeds,
{threads} thread; {processor}, commit {commit}, torch {torch}, Transformers {transformers}). The numbers:
`benchmarks/results/compare.json`.

One base, the tiny world's of {num_layers} layers. Every method reads the same {conversations} conversations in the
same order, {batch_size} in each of {steps} optimizer steps. Accuracy is exact match on {per_family} held-out
questions of each of {num_families} families, ± the standard deviation over seeds where there are several.

## What it shows

{claims}

"Not told apart": the mean of the differences, seed by seed, lies within two standard errors of 0, or within
{least:.0f} point of accuracy.

- **Accuracy.** Models with experts begin as the base, which knows this world already: {dense_gain:+.1f} points for the
  same MLPs trained dense, {moe_gain:+.1f} for MoE-LLaVA, {evomoe_gain:+.1f} for EvoMoE, against the untrained base. RoE
  begins with {roe_skipped:.0f} % less of it: after {steps} steps it is {over_static:+.1f} points from the best layers
  dropped for all, and {over_dense:+.1f} from dense, which decides the first row; of the {claimed} that says
  nothing, as models with experts have nothing to lose here. {full_roe}
- **Both.** RoE on MoE-LLaVA, whose experts learned in the first {expert_steps} steps, skips {both_skipped:.1f} % of the
  layers and is {both_over_roe:+.1f} points from RoE on the dense base, which had {expert_steps} steps more: the two
  go together, and experts give routing over layers nothing here. It computes
  {both_flops:.0f} % of the base's FLOPs per decoded token, where MoE-LLaVA computes {moe_flops:.0f} %, and takes
  {both_time:.2f} times the base's time for a question and {tokens} tokens.
- **Speed.** RoE computes {roe_flops:.0f} % of the base's FLOPs per decoded token, MoE-LLaVA {moe_flops:.0f} %, EvoMoE
  {evomoe_flops:.0f} %. For a question and {tokens} tokens they take {roe_time:.2f}, {moe_time:.2f} and
  {evomoe_time:.2f} times the base's time: in a model this small much of the time is not computing but calling.
- **Uniform experts.** What MoE-LLaVA's experts moved has a cosine of {moe_moved:.2f}, their outputs one of
  {moe_outputs:.4f}; rotating routers costs {moe_rotation_costs_points:.1f} points. {evolved}
- **Rigid routers.** Image and text tokens part by {moe_apart:.2f} in MoE-LLaVA and by {evomoe_apart:.2f} in EvoMoE (0
  alike, 1 disjoint), before any training by {moe_apart_before:.2f} and {evomoe_apart_before:.2f}; the entropy of
  probabilities is {moe_undecided:.2f} and {evomoe_undecided:.2f} of the largest.{other_weight}

**A tiny model can show** that all three run on one footing, what each costs in parameters, FLOPs and seconds, and
whether mechanisms (routers that part modalities, experts that become different, layers that are left out) happen at
all. **It cannot show** who wins at 7B: {conversations} conversations are {share:.1f} % of the papers' 665k, the base
knows this world already so that there is little left to learn, pictures are 16 tokens of 576, an MLP here is
{mlp_share:.0f} % of a layer's weights, and questions are of eight kinds. With {num_seeds} seeds and {questions}
questions, differences below a point say nothing.

## All systems

{systems}

M: millions. Activated parameters are those a token of an answer goes through, with embeddings and vision tower; for
RoE the mean over its routes, {roe_skipped:.1f} % of the layers skipped, with adapters and routers. FLOPs are the
decoder's (torch's counter, eager attention and experts; `test_compare.py` holds it against a formula), by token: of a
prefill over the prompt's tokens, and of a decoded token with the head. Training is the process's own time, whatever
else the machine did.{controls}

![Accuracy over activated parameters and seconds](compare_accuracy.png)

### Accuracy by family, %

{families}

## Speed

All systems took turns in one process, each prompt in a new order ({rounds} rounds, {tokens} decoded tokens,
{speed_threads} thread, trained models of seed {speed_seed}, experts with the faster of two implementations). The
ratio is the base's time over the system's in the same round, median and quartiles. **Only ratios count**: other work
may have run on the machine. "{control}" is the base's network with other weights, so what its ratio lacks of 1 is
noise.

{speeds}

## Experts

{experts}

Cosines are means over pairs of experts of a layer, then over layers: of all weights, of what the weights moved since
the experts were copies, and of outputs for the same held-out token. Apart: how differently image and text tokens are
spread over experts (0 alike, 1 disjoint). Differ: chance that two tokens of one modality have another first expert
(0.75 at most). Undecided: entropy of the router's probabilities, 1 where they are even. "Rotated" sends every token
to the experts with the next numbers; "single" sends all tokens through one ({control_questions} questions).

![Expert similarity](compare_similarity.png)

![Routing by modality](compare_modality.png)

## Is that fair?

What each method learns, and what it costs beside its steps:

{freedom}

- **RoE trains adapters on a frozen base, MoE-LLaVA experts, EvoMoE in its warm-up nearly all.** {counterparts}
- **RoE gets forward passes that others do not**: its search and measured routes are worth about {extra_steps}
  optimizer steps more than the {steps} here. The static drop takes the best set that this search measured, so it had
  them too.
- **{roe_steps}** RoE has to learn to do without layers from nothing, while the others begin as the base and can stay
  what they are.
- **RoE's recipe was made on this world**; its rates were not searched again. Those of the others were searched with
  little: one short run for each of few rates, one seed, and a single rate for EvoMoE's routers. Of rates within 1 % of
  the least loss the largest is taken, as experts have to move to become different.
- **EvoMoE's budget is shared**: warm-up, evolution and routers have {shares} steps, in the paper's proportions (5200,
  10395, 10395), each with a schedule of its own. Its paper does not say what weight the chosen expert's output has.
  {ones}
- **MoE-LLaVA computes more than the base**: {k} of 4 experts per token. Its stage III has all {steps} steps, the
  paper's balancing loss of 0.01 and no capacity. It begins, as in the paper, from a base that had its instruction
  tuning.
- **The static drop is exactly as deep for all**, at {static_skipped:.1f} % skipped where RoE has {roe_skipped:.1f} %.
- RoE's loss is a mean over conversations, the others' over tokens, each as published. AdamW, cosine, 5 % warm-up, no
  weight decay and {batch_size} conversations per step are common to all.

Learning rates, by token loss (nats) on validation questions after {rate_steps} steps ({rate_evo} for EvoMoE), seed
{rate_seed}:

{rated}
"""


# --------------------------------------------------------------------------------------------------------------- page


def page(result: dict) -> str:
    """The page in markdown; it expects the pictures beside it."""
    rows = shown_methods(result["summary"]["methods"])
    settings, speed, rates = result["settings"], result["speed"], result["rates"]
    by_name = {row["method"]: row for row in rows}
    families = list(rows[0]["accuracy_by_family"])
    return PAGE.format(
        **{name: result[name] for name in ("command", "minutes", "cpu_minutes", "threads", "processor", "commit")},
        **{name: result[name] for name in ("torch", "transformers", "num_layers", "extra_steps", "rate_seed")},
        **{name: settings[name] for name in ("batch_size", "steps", "per_family", "rate_steps")},
        num_seeds=len(by_name["roe"]["seeds"]),
        conversations=settings["steps"] * settings["batch_size"],
        share=100 * settings["steps"] * settings["batch_size"] / 665_000,
        mlp_share=100 * result["mlp_share"],
        num_families=len(families),
        questions=settings["per_family"] * len(families),
        claims=table(
            ["Claim", "Paper", "Here", "Same direction"],
            [[one[name] for name in ("claim", "paper", "here", "same")] for one in result["summary"]["claims"]],
        ),
        systems=systems_table(rows),
        roe_skipped=100 * by_name["roe"]["skip_ratio"]["mean"],
        families=table(
            ["System", *families],
            [
                [LABELS[row["method"]], *(f"{100 * row['accuracy_by_family'][one]:.0f}" for one in families)]
                for row in rows
            ],
        ),
        rounds=speed["rounds"],
        tokens=speed["tokens"],
        speed_threads=speed["threads"],
        speed_seed=speed["seed"],
        control=LABELS["dense_mlps"],
        speeds=speed_table(speed),
        experts=experts_table(rows),
        control_questions=settings["control_per_family"] * len(families),
        freedom=freedom_table(rows),
        controls=f" Controls, below the first {len(METHODS)}, have fewer seeds." if len(rows) > len(METHODS) else "",
        counterparts=counterparts(by_name),
        full_roe=full_roe(result),
        roe_steps=roe_steps(result),
        expert_steps=round(settings["steps"] / 3),
        both_skipped=100 * by_name["roe_moe"]["skip_ratio"]["mean"],
        **compared_numbers(result, by_name),
        static_skipped=100 * by_name["static"]["skip_ratio"]["mean"],
        shares=", ".join(map(str, result["evomoe_steps"])),
        ones=weights_text(rates["evomoe_ones"], "evomoe_other" in by_name),
        k=2,
        rate_evo=result["evomoe_rate_steps"],
        rated=rated_table(result),
    )


def compared_numbers(result: dict, by_name: dict[str, dict]) -> dict:
    """The numbers of the text under the claims."""
    rows = result["speed"]["batches"]["1"]
    level = {name: 100 * row["accuracy"]["mean"] for name, row in by_name.items()}
    flops = {name: row["flops"]["decode_per_token"] for name, row in by_name.items()}
    found = {
        "least": LEAST_POINTS,
        "claimed": f"{result['summary']['claims'][0]['paper']} that RoE's paper claims over MoE-LLaVA",
        "dense_gain": level["dense_mlps"] - level["base"],
        "over_static": level["roe"] - level["static"],
        "over_dense": level["roe"] - level["dense_mlps"],
        "both_over_roe": level["roe_moe"] - level["roe"],
    }
    for name, short in (("moe_llava", "moe"), ("evomoe", "evomoe"), ("roe", "roe"), ("roe_moe", "both")):
        found[f"{short}_gain"] = level[name] - level["base"]
        found[f"{short}_flops"] = 100 * flops[name] / flops["base"]
        found[f"{short}_time"] = 1 / answer_ratio(rows, name, "base")
        for number, values in by_name[name].get("experts", {}).items():
            found[f"{short}_{number}"] = values["mean"] if isinstance(values, dict) else values
    for name, short in (("moe_llava", "moe"), ("evomoe", "evomoe")):
        found[f"{short}_apart_before"] = mean(result["untrained_apart"][name])
    found["other_weight"] = other_weight_text(by_name.get("evomoe_other"))
    found["moe_rotation_costs_points"] = 100 * found["moe_rotation_costs"]
    return found | {"evolved": evolved_text(found)}


def other_weight_text(row: dict | None) -> str:
    """What routers of the control do, if it was run."""
    if row is None:
        return ""
    apart, undecided = (row["experts"][name]["mean"] for name in ("apart", "undecided"))
    return (
        f' In "{LABELS["evomoe_other"]}" these are {apart:.2f} and {undecided:.2f} (one seed where others have more).'
    )


def evolved_text(found: dict) -> str:
    """Whether evolution made experts less alike."""
    numbers = f"{found['evomoe_moved']:.3f} and {found['evomoe_outputs']:.4f}"
    if found["evomoe_outputs"] < found["moe_outputs"]:
        return f"Evolved experts are less alike ({numbers})."
    return (
        f"Evolved experts are more alike ({numbers}): they are averages of one path, which is short here, and what "
        "they give can differ no more than the path is long."
    )


def counterparts(by_name: dict[str, dict]) -> str:
    """Which dense models stand beside the methods."""
    texts = {
        "dense_mlps": "the MLPs that become experts (MoE-LLaVA's and the second stage of EvoMoE)",
        "dense_all": "all but the vision tower (EvoMoE's warm-up)",
        "dense_adapters": "adapters beside every layer (RoE's)",
    }
    found = [text for name, text in texts.items() if name in by_name]
    text = f"Dense counterparts learn {'; '.join(found)}. [quality](quality.md) has adapters beside, too."
    if "moe_warmed" in by_name:
        text += f' "{LABELS["moe_warmed"]}" begins where the evolution does, with the same steps left.'
    return text


def full_roe(result: dict) -> str:
    """RoE with its own number of steps, where that is another."""
    found = result["full_roe"]
    if found is None:
        return "[quality](quality.md) has its full run."
    if found["steps"] == result["settings"]["steps"]:
        return "[quality](quality.md) holds it against other ways to skip."
    return (
        f"After {found['steps']} steps, in [quality](quality.md), it has {100 * found['accuracy']['mean']:.1f} % at "
        f"{100 * found['skip_ratio']['mean']:.1f} % skipped, and the base given the same training "
        f"{100 * found['dense_accuracy']['mean']:.1f} %."
    )


def roe_steps(result: dict) -> str:
    """Whether RoE had the steps of its recipe."""
    found, steps = result["full_roe"], result["settings"]["steps"]
    if found is not None and steps < found["steps"]:
        return f"RoE has too few steps here, {steps} where its recipe has {found['steps']}."
    return f"The number of steps, {steps}, is that of RoE's recipe."


def weights_text(ones: bool, has_other: bool) -> str:
    """Which weight EvoMoE's chosen expert has, and why."""
    what, other = ("1", "its probability") if ones else ("its probability", "1")
    text = f"Here it is {what}, which did better on validation questions than {other}"
    text += "; its routers then learn of the balancing loss alone" if ones else ""
    return text + (f'. "{LABELS["evomoe_other"]}" has {other}.' if has_other else ".")


def systems_table(rows: Sequence[dict]) -> str:
    header = ["System", "Seeds", "Accuracy, %", "Activated, M", "Total, M", "MFLOPs, prefill", "MFLOPs, decoded"]
    cells = []
    for row in rows:
        sizes = [f"{row['parameters'][name] / 1e6:.2f}" for name in ("activated", "total")]
        work = [f"{row['flops'][name] / 1e6:.2f}" for name in ("prefill_per_token", "decode_per_token")]
        start = [LABELS[row["method"]], str(len(row["seeds"])), percent(row["accuracy"])]
        cells.append([*start, *sizes, *work, f"{row['cpu_minutes']['mean']:.1f}"])
    return table([*header, "Training, CPU min"], cells)


def speed_table(speed: dict) -> str:
    header = ["System", "Batch", "Prefills/s", "base / it", "Tokens/s", "base / it", "Experts"]
    cells = []
    for batch_size, rows in speed["batches"].items():
        for method in dict.fromkeys(row["method"] for row in rows):
            row = fastest(rows, method)
            parts = []
            for part in ("prefill", "decode"):
                low, high = row[part]["quartiles"]
                parts += [f"{row[part]['per_second']:.0f}", f"{row[part]['ratio']:.2f} ({low:.2f} to {high:.2f})"]
            cells.append([LABELS[method], batch_size, *parts, row["implementation"] or ""])
    return table(header, cells)


def experts_table(rows: Sequence[dict]) -> str:
    names = ("weights", "moved", "outputs", "apart", "differ", "undecided")
    header = ["System", *(f"Cosine of {name}" for name in names[:3]), *(name.capitalize() for name in names[3:])]
    cells = []
    for row in rows:
        if "experts" in row:
            found = row["experts"]
            # Single precision can take the cosine of nearly equal vectors over 1.
            numbers = [f"{min(found[name]['mean'], 1.0):.{5 if name == 'weights' else 3}f}" for name in names]
            single = ", ".join(f"{100 * one:.1f}" for one in found["single"])
            lost = f"{100 * found['routed']:.1f} → {100 * (found['routed'] - found['rotation_costs']['mean']):.1f}"
            cells.append([LABELS[row["method"]], *numbers, lost, single])
    return table([*header, "Accuracy, rotated, %", "Single, %"], cells)


def freedom_table(rows: Sequence[dict]) -> str:
    """What learns, by stage."""
    cells = []
    for row in rows:
        learned = "; ".join(f"{name}: {number / 1e6:.2f} M" for name, number in row["learned"].items())
        cells.append([LABELS[row["method"]], learned or "nothing", BESIDE.get(row["method"], "")])
    return table(["System", "Learns", "Beside its steps"], cells)


def rated_table(result: dict) -> str:
    cells = []
    for one in result["ratings"]:
        chosen = one["rate"] == result["rates"][one["what"]]
        if one["what"] == "evomoe":
            chosen = chosen and one["ones"] == result["rates"]["evomoe_ones"]
        label = LABELS[one["what"]] + (", weights 1" if one["ones"] else "")
        cells.append([label, f"{one['rate']:g}", f"{one['validation_loss']:.4f}", "taken" if chosen else ""])
    return table(["What", "Rate", "Loss", ""], cells)


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_all(result: dict, folder: Path) -> None:
    """compare_accuracy.png, compare_similarity.png and compare_modality.png."""
    draw_accuracy(result, folder / "compare_accuracy.png")
    draw_similarity(result, folder / "compare_similarity.png")
    draw_modality(result, folder / "compare_modality.png")


def draw_accuracy(result: dict, path: Path) -> None:
    """A dot per run, a ring at the mean: over activated parameters, and over seconds of a question."""
    figure = new_figure(11, 4.6, "Accuracy over what an answer costs")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = result["speed"]["batches"]["1"]
    for row in shown_methods(result["summary"]["methods"]):
        method, level = row["method"], 100 * row["accuracy"]["mean"]
        color = COLORS[method]
        label = LABELS[method]
        runs = [run for run in result["runs"] if run["method"] == method]
        places = [run["parameters"]["activated"] / 1e6 for run in runs]
        left.scatter(places, [100 * run["accuracy"] for run in runs], color=color, s=14, alpha=0.5)
        left.scatter([mean(places)], [level], color=color, marker="o", s=60, label=label)
        timed = fastest(rows, method)
        if timed is not None:
            seconds = timed["prefill"]["seconds"] + TOKENS * timed["decode"]["seconds"]
            right.scatter([1000 * seconds], [level], color=color, marker="o", s=60)
    left.set_xlabel("activated parameters, millions")
    right.set_xlabel(f"milliseconds for a question and {TOKENS} tokens, batch 1")
    left.set_ylabel("exact match, %")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path)


def with_experts(result: dict) -> list[str]:
    return [row["method"] for row in shown_methods(result["summary"]["methods"]) if "experts" in row]


def draw_similarity(result: dict, path: Path) -> None:
    """Cosine between experts by layer, mean over seeds, of what moved and of outputs."""
    figure = new_figure(9, 3.8, "How alike the experts of a layer are (cosine, mean over pairs)")
    for axis, name in zip(figure.subplots(1, 2), ("moved", "outputs"), strict=True):
        for method in with_experts(result):
            runs = [run["experts"]["layers"] for run in result["runs"] if run["method"] == method]
            numbers = [layer["layer"] for layer in runs[0]]
            heights = [mean(run[place][name] for run in runs) for place in range(len(numbers))]
            axis.plot(numbers, heights, marker="o", color=COLORS[method], label=LABELS[method])
        axis.set_xticks(numbers)
        axis.set_title(
            {"moved": "what their weights moved", "outputs": "outputs for the same token"}[name], fontsize=10
        )
        axis.set_xlabel("decoder layer")
        axis.ticklabel_format(useOffset=False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def draw_modality(result: dict, path: Path) -> None:
    """Share of image and of text tokens that go to each expert, by layer; first seed."""
    first = min(run["seed"] for run in result["runs"])
    runs = {run["method"]: run for run in result["runs"] if run["seed"] == first and "experts" in run}
    figure = new_figure(3.4 * len(runs) + 0.8, 4.2, "Share of the tokens that go to each expert, first seed")
    axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axis, (method, run) in zip(axes, runs.items(), strict=True):
        layers = run["experts"]["layers"]
        cells = [layer[kind] for layer in layers for kind in ("image", "text")]
        image = axis.imshow(cells, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for y, shares in enumerate(cells):
            for x, share in enumerate(shares):
                color = "white" if share > 0.6 else INK
                axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
        axis.set_xticks(range(len(cells[0])), [f"expert {number + 1}" for number in range(len(cells[0]))], fontsize=8)
        names = [f"layer {layer['layer']}, {kind}" for layer in layers for kind in ("image", "text")]
        axis.set_yticks(range(len(names)), names, fontsize=8)
        for y in range(2, len(cells), 2):
            axis.axhline(y - 0.5, color=FAINT, linewidth=1)
        axis.set_title(LABELS[method], fontsize=9)
    figure.colorbar(image, ax=list(axes), shrink=0.8)
    figure.savefig(path)


__all__ = ["draw_all", "page"]
