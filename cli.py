"""`roe-llava`: the commands.

A command is a module with `add_arguments(parser)` and `run(args)`. It is imported when its command is asked for, so
that help comes at once. One without `add_arguments` reads the words behind its name itself (`args.rest`).
"""

import argparse
import importlib
import sys

COMMANDS = {
    "bake": ("convert.bake", "freeze one route into a smaller checkpoint, a stock LLaVA where that loses nothing"),
    "bench": ("benchmarks.bench", "time prefill and decoding beside the base and beside what is possible"),
    "calibrate": ("convert.calibrate", "measure the table for generate(skip_ratio=...) and store it with the routers"),
    "card": ("hub_card.card", "write the page of a model for the Hub, filled from its files and results"),
    "demo": ("examples.tiny_world.demo", "answer held-out questions with the shipped model, base beside RoE"),
    "evaluate": ("evaluation.evaluate", "score benchmarks through lmms-eval, routed beside dense"),
    "extract": ("convert.extract", "take the adapter file back out of a RoE checkpoint"),
    "import-llava": ("convert.import_llava", "turn an original LLaVA-1.5 checkpoint into the layout of llava-hf"),
    "import-llava-hr": ("convert.import_llava_hr", "turn a published LLaVA-HR checkpoint into a base of ours"),
    "import-moe-llava": ("convert.import_moe_llava", "turn a published MoE-LLaVA checkpoint (DeepSpeed) into ours"),
    "import-reference": ("convert.import_reference", "turn a checkpoint of the published RoE code into ours"),
    "import-vila": ("convert.import_vila", "turn a published VILA checkpoint (v1.0 or 1.5) into a base of ours"),
    "export-reference": ("convert.export_reference", "turn a RoE checkpoint into the layout of the published code"),
    "graft": ("convert.graft", "put trained routing parts onto a LLaVA checkpoint"),
    "push": ("hub_card.push", "check a model or an adapter file and put it on the Hub, card and code included"),
    "serve": ("serving.serve", "answer over HTTP as OpenAI's API does, with transformers serve"),
    "train": ("training.train", "train routing parts on your own data, by a recipe"),
    "train-moe": ("training.train_moe", "train experts and routers, in the stages of MoE-LLaVA and EvoMoE"),
    "upcycle": ("convert.upcycle", "give a dense LLaVA experts: copies of its own MLPs, and new routers"),
    "verify": ("convert.verify", "check on real weights that routing changes nothing it should not, and what it saves"),
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen command's module is imported and gives its arguments."""
    parser = argparse.ArgumentParser(prog="roe-llava", description="Routing Experts (RoE) for LLaVA.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        module = importlib.import_module(f".{module}", __package__) if name == chosen else None
        reads_itself = module is not None and not hasattr(module, "add_arguments")
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            add_help=not reads_itself,
            allow_abbrev=False,  # --roe would be taken for verify's --roe-revision
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if module is not None:
            if not reads_itself:
                module.add_arguments(command)
            command.set_defaults(run=module.run, reads_itself=reads_itself)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns: exit status: 0, or what the command returns, or 2 for wrong arguments and input.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(next((word for word in argv if not word.startswith("-")), None))
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and not args.reads_itself:
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
