"""Options that every command has which turns one checkpoint into another."""


def add_common_arguments(parser, source: str) -> None:
    """`--revision`, `--overwrite` and `--dry-run`.

    Args:
        source: the argument that `--revision` belongs to, as the help names it.
    """
    parser.add_argument("--revision", help=f"revision of {source} on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new folder is whole")
    parser.add_argument("--dry-run", action="store_true", help="read and check everything, write nothing")


def common_options(args) -> dict:
    """Those options as keywords of the command's function."""
    return {"revision": args.revision, "overwrite": args.overwrite, "dry_run": args.dry_run}
