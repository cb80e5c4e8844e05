"""Calibrates the shipped tiny model on the validation split and holds its table against the test split.

`python -m roe_llava.benchmarks.calibration_tiny` writes `results/calibration_tiny.json`; `--store` puts the table into
the shipped adapter file too. Beside the one bias for all layers that `calibrate` takes, biases in proportion to how
much a layer's margin varies are measured: the reason why there is no such choice.
"""

import argparse
import json
from pathlib import Path

import torch

from ..adapter_roe import ABOUT_NAME
from ..convert.calibrate import store_table
from ..convert.source import resolve_source
from ..examples.tiny_world.asking import prompts
from ..examples.tiny_world.demo import SHIPPED
from ..examples.tiny_world.evaluate import MAX_ANSWER_TOKENS, family_examples
from ..examples.tiny_world.world import FAMILIES
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..processing_roe import RoeLlavaProcessor
from ..training.calibration import calibrate, decisions
from .environment import command_line, describe_machine

RESULT = Path(__file__).parent / "results" / "calibration_tiny.json"
JUDGED = (0.1, 0.2, 0.3, 0.4)
BETWEEN = (0.07, 0.13, 0.22, 0.33, 0.47)  # on lines between entries; no accuracy is measured there


def questions(split: str, per_family: int) -> list[dict]:
    return [example for family in FAMILIES for example in family_examples(family, per_family, split=split)]


def batches_of(processor, examples: list[dict], batch_size: int = 50) -> list:
    return [prompts(processor, examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]


@torch.inference_mode()
def judge(model, processor, examples: list[dict], batches: list, skip_ratio: float) -> dict:
    """Share skipped and accuracy of `generate(skip_ratio=...)`."""
    texts, routes = [], []
    settings = {"do_sample": False, "max_new_tokens": MAX_ANSWER_TOKENS, "return_dict_in_generate": True}
    for batch in batches:
        output = model.generate(**batch, **settings, skip_ratio=skip_ratio)
        new_tokens = output.sequences[:, batch["input_ids"].shape[1] :]
        texts += processor.batch_decode(new_tokens, skip_special_tokens=True)
        routes.append(output.past_key_values.routes)
    right = [text.strip() == example["turns"][-1][1] for text, example in zip(texts, examples, strict=True)]
    return {
        "skip_ratio": skip_ratio,
        "realised": 1 - torch.cat(routes).double().mean().item(),
        "accuracy": sum(right) / len(right),
    }


def realised(model, batches: list, table, skip_ratio: float) -> dict:
    """Share that a ratio between two entries skips."""
    routes, _ = decisions(model, batches, table.biases_for(skip_ratio))
    return {"skip_ratio": skip_ratio, "realised": 1 - routes.double().mean().item()}


def spread(model, batches: list) -> list[float]:
    """Factors in proportion to the standard deviation of each layer's margin, 1 on average."""
    layers = model.config.text_config.num_hidden_layers
    deviations = decisions(model, batches, [0.0] * layers)[1].std(dim=0)
    return [round(one, 4) if one > 1e-3 else 0.0 for one in (deviations / deviations.mean()).tolist()]


def measure(model, processor, per_family: int, judged_per_family: int) -> tuple[dict, object]:
    """All results, and the table to store."""
    known, asked = questions("validation", per_family), questions("test", judged_per_family)
    known_batches, asked_batches = batches_of(processor, known), batches_of(processor, asked)
    result, tables = {"calibrated_on": len(known), "judged_on": len(asked), "ways": {}}, {}
    for way, scale in (("one bias", None), ("in proportion to spread", spread(model, known_batches))):
        passes = []
        table = calibrate(model, known_batches, layer_scale=scale, progress=lambda *point, to=passes: to.append(point))
        model.config.skip_calibration, tables[way] = table.to_dict(), table
        result["ways"][way] = {
            "passes": len(passes),
            "table": table.to_dict(),
            "judged": [judge(model, processor, asked, asked_batches, ratio) for ratio in JUDGED],
            "between": [realised(model, asked_batches, table, ratio) for ratio in BETWEEN],
        }
    result["every layer kept"] = judge(model, processor, asked, asked_batches, 0.0)
    return result, tables["one bias"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=SHIPPED / "base")
    parser.add_argument("--roe", type=Path, default=SHIPPED / "roe")
    parser.add_argument("--per-family", type=int, default=50, help="questions to calibrate with (%(default)s)")
    parser.add_argument("--judged", type=int, default=100, help="questions per family to judge with (%(default)s)")
    parser.add_argument("--store", action="store_true", help=f"put the table into {ABOUT_NAME}, replacing one there")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = RoeLlavaForConditionalGeneration.from_base(str(args.base), str(args.roe), dtype="auto").float().eval()
    processor = RoeLlavaProcessor.from_pretrained(args.base)
    result, table = measure(model, processor, args.per_family, args.judged)
    about = {"command": command_line("roe_llava.benchmarks.calibration_tiny"), "machine": describe_machine()}
    args.out.write_text(json.dumps(about | {"dtype": "float32", "threads": 1} | result, indent=2) + "\n")
    if args.store:
        store_table(resolve_source(args.roe), table, overwrite=True)
    for way, found in result["ways"].items():
        for row in [*found["judged"], *found["between"]]:
            print(f"{way:26} {row['skip_ratio']:.2f} {row['realised']:.4f} {row.get('accuracy', '')}")
    print("every layer kept", result["every layer kept"])


if __name__ == "__main__":
    main()
