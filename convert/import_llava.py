"""`roe-llava import-llava SRC OUT`: a LLaVA-1.5 checkpoint in its original layout, to the layout of llava-hf.

The result is a stock LLaVA: it opens with `LlavaForConditionalGeneration`, and routing parts are grafted onto it.
"""

from pathlib import Path

from .arguments import add_common_arguments, common_options
from .original_import import add_import_arguments, import_original
from .summary import Summary


def import_llava(
    source: str | Path,
    out: str | Path,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Import a LLaVA without routing parts; arguments and errors as in `import_original`."""
    options = {"revision": revision, "overwrite": overwrite, "dry_run": dry_run}
    return import_original(source, out, routed=False, vision_tower=vision_tower, **options)


def add_arguments(parser) -> None:
    """Arguments of the command."""
    add_import_arguments(parser, "LLaVA checkpoint in the original layout")
    add_common_arguments(parser, "SRC")


def run(args) -> None:
    """Run the command."""
    print(import_llava(args.source, args.out, vision_tower=args.vision_tower, **common_options(args)))
