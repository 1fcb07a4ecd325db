"""``cloob models``: the towers by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cloob.commands.console import refuse, say_next, tyro
from cloob.errors import nearest


@dataclass(frozen=True)
class Options:
    """List the towers by name; ours first, then open_clip's."""

    contains: str = ""  # Only names with this in them, in any case.
    purpose: Annotated[Literal["photos"] | None, tyro.conf.arg(name="for")] = None
    """photos: a few trained models for `cloob find`, with size, licence and languages."""


def run(options: Options) -> int:
    refuse({"--contains and --for exclude each other": options.contains and options.purpose})
    from cloob.models.source import PHOTOS, known_models

    if options.purpose:
        for name, megabytes, pixels, licence, languages in PHOTOS:
            print(f"{name:<44}  {megabytes:5,} MB  {pixels} px  {licence:<20}  {languages}")
        say_next(["find", "PHOTOS", "a red bird", "--model", PHOTOS[0].name])
        return 0
    known = known_models()
    names = [name for name in known if options.contains.lower() in name.lower()]
    refuse({f"no model has {options.contains!r} in its name; {nearest(options.contains, known)}": not names})
    print("\n".join(names))
    say_next(["train", "--data", "demo", "--model", names[0]])
    return 0
