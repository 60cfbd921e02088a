"""`compress push DIR REPO`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.flags import Json, Quiet
from compressor.cli.render import STDOUT, RichProgress, print_json


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that compress wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; created if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only its owner may see it.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Upload what is not verified or did not pass the gate; replace other files.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="Print the model card, upload nothing.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a result to the Hub with a model card, in one commit."""
    if card:
        from compressor.ship.card import make_card
        from compressor.ship.origin import origin_of

        sys.stdout.write(make_card(directory, repo, origin_of(directory)))
        return
    from dataclasses import asdict

    from compressor.ship.push import push as upload

    with RichProgress(quiet or json_) as progress:
        done = upload(directory, repo, private=private, force=force, progress=progress)
    if json_:
        print_json(asdict(done))
        return
    what = f"{done.changed} of {done.files} files uploaded" if done.changed else "everything is there already"
    STDOUT.print(f"{done.repo}: {what}, commit {done.commit}", soft_wrap=True, markup=False)
