"""`roe-llava serve MODEL ...`: `transformers serve` that knows RoE checkpoints.

Registers our classes with the Auto classes and by name where the server looks names up, refuses what cannot keep a
route per request, and hands the arguments on. Answers take the routes that `generate` takes; requests run one by one.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto import modeling_auto

from ..configuration_roe import RoeLlavaConfig
from ..modeling_roe_llava import RoeLlavaForConditionalGeneration
from ..processing_roe import RoeLlavaProcessor

USAGE = """\
usage: roe-llava serve CHECKPOINT [--debug] [options of transformers serve]

CHECKPOINT is a folder or Hub id; its code is not run, the installed package's is. These are the options of transformers
serve; --continuous-batching and --compile are refused.
"""
REFUSED = {
    "--continuous-batching": (
        "it packs several requests into one row, and a row has one route. Leave it out: requests run one by one"
    ),
    "--compile": "it compiles the model as one graph, and every route has its own layers. Leave it out",
}


def register() -> None:
    """Make our type one that Transformers knows: no code of a checkpoint runs, and nobody is asked to trust it."""
    AutoConfig.register(RoeLlavaConfig.model_type, RoeLlavaConfig, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(RoeLlavaConfig, RoeLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(RoeLlavaConfig, RoeLlavaProcessor, exist_ok=True)
    # The server (5.23) looks in this table for the model type when it loads, and for the class's name when it reads
    # messages.
    names = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    names[RoeLlavaConfig.model_type] = RoeLlavaForConditionalGeneration.__name__


def check_words(words: list[str]) -> None:
    """Raises: ValueError for options of `transformers serve` that routes do not survive."""
    for word in words:
        name = word.split("=", 1)[0].replace("_", "-")
        if name in REFUSED:
            raise ValueError(f"{name} is not supported: {REFUSED[name]}")


def check_installed() -> None:
    """Raises: ValueError if the server's requirements are missing."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError('the server needs more packages: pip install "roe-llava[serve]" (transformers[serving])')


def run(args) -> int:
    """The command; `args.rest` are the words for `transformers serve`.

    Returns: exit status.
    Raises: SystemExit after help; ValueError for options that routes do not survive, and for missing requirements;
        KeyboardInterrupt when stopped from the keyboard.
    """
    check_words(args.rest)
    wants_help = bool({"--help", "-h"} & set(args.rest))
    if wants_help:
        print(USAGE)
    else:
        check_installed()
        register()
    import click
    from transformers.cli.transformers import app

    try:
        status = app(["serve", *args.rest], prog_name="roe-llava", standalone_mode=False)
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
