"""`roe-llava import-reference SRC OUT`: a checkpoint of the published RoE code, to ours.

That is the original LLaVA layout with routing parts: `adapter_MHA`, `adapter_MHA_router` and the two tokens. Nothing in
its config speaks of them, so sizes are read off the tensors and routing follows the published inference.
"""

from pathlib import Path

from .arguments import add_common_arguments, common_options
from .original_import import add_import_arguments, import_original
from .summary import Summary


def import_reference(
    source: str | Path,
    out: str | Path,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Import a published RoE checkpoint; arguments and errors as in `import_original`."""
    options = {"revision": revision, "overwrite": overwrite, "dry_run": dry_run}
    return import_original(source, out, routed=True, vision_tower=vision_tower, **options)


def add_arguments(parser) -> None:
    """Arguments of the command."""
    add_import_arguments(parser, "checkpoint of the published RoE code")
    add_common_arguments(parser, "SRC")


def run(args) -> None:
    """Run the command."""
    print(import_reference(args.source, args.out, vision_tower=args.vision_tower, **common_options(args)))
