"""``cloob models``: list the towers by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cloob.commands.console import arg, refuse, say_next
from cloob.errors import nearest
from cloob.models.source import PHOTOS, known_models


@dataclass(frozen=True)
class Options:
    """List the towers by name; ours first, then open_clip's."""

    contains: str = ""
    """Only names with this in them, in any case."""
    purpose: Annotated[Literal["photos"] | None, arg(name="for")] = None
    """photos: trained models for `cloob find`."""


def run(options: Options) -> int:
    refuse(
        {
            "--contains and --for exclude each other": options.contains
            and options.purpose
        }
    )
    if options.purpose:
        for name, megabytes, pixels, licence, languages in PHOTOS:
            print(
                f"{name:<44}  {megabytes:5,} MB  {pixels} px  {licence:<20}  {languages}"
            )
        say_next(["find", "PHOTOS", "a red bird", "--model", PHOTOS[0].name])
        return 0
    known = known_models()
    names = [name for name in known if options.contains.lower() in name.lower()]
    refuse(
        {
            f"no model has {options.contains!r} in its name; {nearest(options.contains, known)}": not names
        }
    )
    print("\n".join(names))
    say_next(["train", "--data", "demo", "--model", names[0]])
    return 0
