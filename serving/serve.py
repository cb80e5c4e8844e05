"""`roe-llava serve MODEL ...`: `transformers serve` that knows our kinds of checkpoints.

Registers our classes with the Auto classes and by name where the server looks names up, refuses what cannot keep a
route per request, and hands the arguments on. Answers are those of `generate`; requests run one by one.
"""

import argparse
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from ..convert.bases import refuse_other_bases
from ..convert.completeness import check_files
from ..convert.kinds import KINDS, MOE, ROE, Kind, kind_of, listed_types
from ..evaluation.loading import checkpoint_type
from ..generation_roe import bias_for_skip_ratio

USAGE = """\
usage: roe-llava serve CHECKPOINT [--debug] [--skip-ratio R] [options of transformers serve]

CHECKPOINT is a folder or Hub id; its code is not run, the installed package's is. --skip-ratio R has every request skip
that share of the layers on average (0.0: none), of a model that roe-llava calibrate has measured. These are the options
of transformers serve; --continuous-batching and --compile are refused.
"""
REFUSED = {
    "--continuous-batching": (
        "it packs several requests into one row, and a row has one route (with experts it was not tried). Leave it "
        "out: requests run one by one"
    ),
    "--compile": (
        "it compiles the model as one graph, and every route has its own layers (with experts it was not tried). Leave "
        "it out"
    ),
}


def model_class(skip_ratio: float | None, kind: Kind = ROE) -> type[PreTrainedModel]:
    """The class that answers for a kind: its own, or one whose every generation has this skip ratio.

    It raises ValueError when a model is opened that is not calibrated for it.
    """
    if skip_ratio is None or kind.decides != "layers":
        return kind.model

    class Served(kind.model):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            model = super().from_pretrained(*args, **kwargs)
            bias_for_skip_ratio(model, skip_ratio, None, None)  # now, not at the first request
            return model

        def generate(self, *args, **kwargs):
            return super().generate(*args, skip_ratio=skip_ratio, **kwargs)

    Served.__name__ = kind.model.__name__  # Transformers knows classes by it
    return Served


def register(skip_ratio: float | None = None) -> None:
    """Make our types ones that Transformers knows: no code of a checkpoint runs, and nobody is asked to trust it."""
    # The server (5.23) looks in this table for the model type when it loads, and for the class's name when it reads
    # messages.
    names = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    for kind in KINDS.values():
        AutoConfig.register(kind.model_type, kind.config, exist_ok=True)
        for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            auto_class.register(kind.config, model_class(skip_ratio, kind), exist_ok=True)
        AutoProcessor.register(kind.config, kind.processor, exist_ok=True)
        names[kind.model_type] = kind.model.__name__


def check_words(words: list[str]) -> None:
    """Raises: ValueError for options of `transformers serve` that routes do not survive."""
    for word in words:
        name = word.split("=", 1)[0].replace("_", "-")
        if name in REFUSED:
            raise ValueError(f"{name} is not supported: {REFUSED[name]}")


def take_skip_ratio(words: list[str]) -> tuple[float | None, list[str]]:
    """The wanted skip ratio and the other words.

    Raises: SystemExit if it is no number.
    """
    parser = argparse.ArgumentParser(prog="roe-llava serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--skip-ratio", "--skip_ratio", type=float, metavar="R")
    asked, others = parser.parse_known_args(words)
    return asked.skip_ratio, others


def check_routed(words: list[str]) -> None:
    """Raises: ValueError if the first word is no checkpoint whose layers are skipped: it alone has a skip ratio."""
    if not words or words[0].startswith("-"):
        raise ValueError("--skip-ratio is for one checkpoint: name it before the options, serve CHECKPOINT ...")
    kind = kind_of(found := checkpoint_type(words[0]))
    if kind is None or kind.decides != "layers":
        wanted = listed_types("layers")
        raise ValueError(f"--skip-ratio: {words[0]} is a {found!r} checkpoint, not {wanted}: nothing is skipped")


def check_base(words: list[str]) -> None:
    """Raises: ValueError if the first word is a folder of RoE on another base, or one of ours that is damaged."""
    if words and (Path(words[0]) / "config.json").is_file():
        found = checkpoint_type(words[0])
        if kind_of(found) is not None:
            check_files(Path(words[0]))
        if found != MOE.model_type:  # what RoE is put onto, too, but served as it is
            refuse_other_bases(found, words[0], "serve")


def check_installed() -> None:
    """Raises: ValueError if the server's requirements are missing."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError('the server needs more packages: pip install "roe-llava[serve]" (transformers[serving])')


def run(args) -> int:
    """The command; `args.rest` are the words for `transformers serve`.

    Returns: exit status.
    Raises: SystemExit after help, and for a skip ratio that is no number; ValueError for options that routes do not
        survive, for a skip ratio that the checkpoint cannot keep, and for missing requirements; KeyboardInterrupt when
        stopped from the keyboard.
    """
    skip_ratio, words = take_skip_ratio(args.rest)
    check_words(words)
    wants_help = bool({"--help", "-h"} & set(words))
    if wants_help:
        print(USAGE)
    else:
        check_installed()
        check_base(words)
        if skip_ratio is not None:
            check_routed(words)
        register(skip_ratio)
    import click
    from transformers.cli.transformers import app

    try:
        status = app(["serve", *words], prog_name="roe-llava", standalone_mode=False)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except click.ClickException as error:  # a wrong word
        error.show()
        status = error.exit_code
    if wants_help:
        raise SystemExit(status or 0)
    return status if isinstance(status, int) else 0


__all__ = ["check_words", "register", "run"]
