"""Builds the demo set that ships in the package, src/cloob/data/demo, from ../shared/data. Same input, same bytes.

    .venv/bin/python benchmarks/build_demo_data.py [--data ../shared/data] [--out src/cloob/data/demo]

Only sources whose licence is public domain, MIT or Apache-2.0 go in. Training pairs: the coloured drawings, since they
are what an emoji set can be reached from, plus some outline icons, since half of the held-out pairs are such icons. Of
openclipart only the drawings are taken that were looked at one by one for ../shared/data/demo (found again by their
pixels: that set codes them anew), so that nothing violent or sexual ships.
"""

from __future__ import annotations

import argparse
import io
import lzma
import random
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cloob.data.batch import caption_id

ROOT = Path(__file__).parents[1]
SEED = 20221
SHARDS = 3
HELD_OUT = 500
MAX_BYTES = 10_000_000


@dataclass(frozen=True)
class Origin:
    """A source: who made it, under which licence, and how many training pairs are taken (None: all)."""

    title: str
    author: str
    licence: str
    package: str
    train: int | None = None


ICONIFY = "npm @iconify/json 2.2.535"
ORIGINS = {
    "openclipart": Origin(
        "Open Clip Art Library 0.18",
        "the Open Clip Art Library's artists",
        "public domain",
        "Debian openclipart-svg, openclipart-png 1:0.18+dfsg-19",
    ),
    "fxemoji": Origin("Firefox OS Emoji", "Mozilla", "Apache-2.0", ICONIFY),
    "fluent-color": Origin("Fluent UI System Color Icons", "Microsoft Corporation", "MIT", ICONIFY),
    "glyphs-poly": Origin("Glyphs Poly", "gorango (github.com/gorango/glyphs)", "MIT", ICONIFY),
    "marketeq": Origin("Marketeq", "Marketeq", "MIT", ICONIFY),
    "flat-color-icons": Origin("Flat Color Icons", "Icons8", "MIT", ICONIFY),
    "meteocons": Origin("Meteocons", "Bas Milius", "MIT", ICONIFY),
    "icon-park": Origin("IconPark", "ByteDance", "Apache-2.0", ICONIFY, 350),
    "tabler": Origin("Tabler Icons", "Paweł Kuna", "MIT", f"{ICONIFY}; tags: npm @tabler/icons 3.52.0", 300),
    "phosphor": Origin("Phosphor", "Phosphor Icons", "MIT", f"{ICONIFY}; tags: npm @phosphor-icons/core 2.1.1", 200),
    "mdi": Origin("Material Design Icons", "Pictogrammers", "Apache-2.0", ICONIFY, 200),
    "healthicons": Origin("Health Icons", "Resolve to Save Lives", "MIT", ICONIFY, 100),
}
OUTLINES = ("tabler", "phosphor", "mdi", "healthicons")
NOTO = Origin("Noto Emoji", "Google Inc", "Apache-2.0", ICONIFY)

# Brands, and persons who are made fun of.
LEFT_OUT = re.compile(
    r"\b(alcatel|beckham|chav|dodge neon|microsoft|weixin|wechat|alipay|tiktok|adobe|google|facebook|twitter|github)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Pair:
    key: str
    image: bytes
    caption: str

    @property
    def source(self) -> str:
        return self.key.rpartition("-")[0]


def read_pairs(paths: list[Path]) -> list[Pair]:
    files: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            files.update((info.name, tar.extractfile(info).read()) for info in tar)
    keys = sorted(name.removesuffix(".webp") for name in files if name.endswith(".webp"))
    return [Pair(key, files[f"{key}.webp"], files[f"{key}.txt"].decode()) for key in keys]


def thumbnails(pairs: list[Pair]) -> np.ndarray:
    """(n, 768) float32: 16×16 RGB."""
    images = (
        Image.open(io.BytesIO(pair.image)).convert("RGB").resize((16, 16), Image.Resampling.BOX) for pair in pairs
    )
    return np.stack([np.asarray(image, dtype=np.float32).ravel() for image in images])


def find_again(wanted: list[Pair], among: list[Pair]) -> list[Pair]:
    """For each wanted picture the same one among others, although it is coded differently."""
    others = thumbnails(among)
    found = set()
    for thumbnail in thumbnails(wanted):
        distance = np.sqrt(((others - thumbnail) ** 2).mean(1))
        if distance.min() < 3:  # grey levels; another coding differs by at most 2.8
            found.add(int(distance.argmin()))
    assert len(found) == len(wanted), f"{len(found)} of {len(wanted)} vetted drawings found"
    return [among[i] for i in sorted(found)]


def choose_train(pairs: list[Pair], vetted: list[Pair], rng: random.Random) -> list[Pair]:
    chosen: list[Pair] = []
    for source, origin in ORIGINS.items():
        own = [pair for pair in pairs if pair.source == source and not LEFT_OUT.search(pair.caption)]
        if source == "openclipart":
            own = find_again(vetted, own)
        chosen += own if origin.train is None else rng.sample(own, origin.train)
    rng.shuffle(chosen)
    return chosen


def choose_held_out(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    allowed = [pair for pair in pairs if pair.source in ORIGINS and not LEFT_OUT.search(pair.caption)]
    drawings = [pair for pair in allowed if pair.source not in OUTLINES]
    outlines = [pair for pair in allowed if pair.source in OUTLINES]
    chosen = drawings + rng.sample(outlines, HELD_OUT - len(drawings))
    rng.shuffle(chosen)
    return chosen


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    """A USTAR archive without times and owners, compressed with xz whatever its name says."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(plain.getvalue(), preset=9))


def write_pairs(folder: Path, pairs: list[Pair], shards: int) -> None:
    for i in range(shards):
        part = pairs[len(pairs) * i // shards : len(pairs) * (i + 1) // shards]
        files = [
            f for pair in part for f in ((f"{pair.key}.webp", pair.image), (f"{pair.key}.txt", pair.caption.encode()))
        ]
        write_tar(folder / f"{i:05d}.tar.xz", files)


def write_noto(folder: Path, source: Path) -> int:
    """CLIP_benchmark's layout; that reader asks for the name 0.tar and, like all of tar's, unpacks what it finds."""
    with tarfile.open(source / "test" / "0.tar") as tar:
        files = [(info.name, tar.extractfile(info).read()) for info in tar]
    write_tar(folder / "test" / "0.tar", files)
    (folder / "test" / "nshards.txt").write_text("1\n")
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    return sum(name.endswith(".webp") for name, _ in files)


def sharing_captions(pairs: list[Pair]) -> int:
    counts = Counter(caption_id(pair.caption) for pair in pairs)
    return sum(count for count in counts.values() if count > 1)


def notice(train: list[Pair], held_out: list[Pair], noto: int) -> str:
    counts = [Counter(pair.source for pair in part) for part in (train, held_out)]
    lines = [
        f"{source:18}{origin.licence:15}{counts[0][source]:>6}{counts[1][source]:>10}  "
        f"{origin.title}, by {origin.author} ({origin.package})"
        for source, origin in ORIGINS.items()
    ]
    lines.append(
        f"{'noto-emoji':18}{NOTO.licence:15}{'':>6}{noto:>10}  {NOTO.title}, by {NOTO.author} ({NOTO.package})"
    )
    licences = [Counter(ORIGINS[pair.source].licence for pair in part) for part in (train, held_out)]
    by_licence = "\n".join(
        f"  {name:15}{licences[0][name]:>6} training pairs, {licences[1][name]:>4} held-out pairs"
        for name in sorted(licences[0])
    )
    shared, distinct = sharing_captions(train), len({caption_id(pair.caption) for pair in train})
    return NOTICE.format(
        table="\n".join(lines),
        by_licence=by_licence,
        train=f"{len(train):,}",
        held_out=len(held_out),
        noto=f"{noto:,}",
        shared=f"{shared:,} of the {len(train):,} training pairs ({shared / len(train):.1%})",
        distinct=f"{distinct:,}",
        held_out_shared=sharing_captions(held_out),
        mit="\n".join(f"  {o.title}: copyright (c) {o.author}" for o in ORIGINS.values() if o.licence == "MIT"),
        apache="\n".join(
            f"  {o.title}: copyright {o.author}" for o in (*ORIGINS.values(), NOTO) if o.licence == "Apache-2.0"
        ),
    )


NOTICE = """\
The demo set of cloob
=====================

Drawings and icons with their names, for a first run without a network: {train} training pairs (train/), {held_out}
held-out pairs (val/), and a labelled set of {noto} emoji (noto-emoji/, CLIP_benchmark's layout). 64x64 RGB on white,
WebP; WebDataset tars, compressed with xz (tar's 512-byte blocks would double the size; WebDataset, CLIP_benchmark and
tar unpack them unasked, also noto-emoji/test/0.tar, which must bear that name). Built by
benchmarks/build_demo_data.py in the source repository; the drawings were rendered from the packages named below,
resized to 64x64 pixels and recoded, mono-coloured icons in a random dark colour; captions are names and tags as those
packages give them.

source            licence         train  held-out  origin
{table}

{by_licence}

Captions that repeat: {shared} share their caption (case
and spacing aside) with another one; {distinct} captions are distinct. Among the held-out pairs {held_out_shared} do.
Held-out captions occur nowhere in training.

Noto's names also occur in training with other drawings (Firefox OS Emoji above all): noto-emoji measures the transfer
to another rendering, not new concepts.

Licences
--------

openclipart: public domain (each file carries the Creative Commons public domain dedication). Thanks to the artists.

Apache License, Version 2.0, whose text is in LICENSE-Apache-2.0 beside this file; changed as described above:
{apache}

MIT License:
{mit}

  Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
  documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
  rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
  persons to whom the Software is furnished to do so, subject to the following conditions:

  The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
  Software.

  THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
  WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
  COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
  OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "cloob" / "data" / "demo")
    args = parser.parse_args()
    rng = random.Random(SEED)
    pictograms = args.data / "pictograms"
    vetted = read_pairs([args.data / "demo" / "clipart.tar"])
    train = choose_train(read_pairs(sorted((pictograms / "train").glob("*.tar"))), vetted, rng)
    held_out = choose_held_out(read_pairs(sorted((pictograms / "val").glob("*.tar"))), rng)
    assert not {caption_id(p.caption) for p in train} & {caption_id(p.caption) for p in held_out}
    write_pairs(args.out / "train", train, SHARDS)
    write_pairs(args.out / "val", held_out, 1)
    noto = write_noto(args.out / "noto-emoji", args.data / "zeroshot" / "noto-emoji")
    text = notice(train, held_out, noto)
    (args.out / "NOTICE").write_text(text, encoding="utf-8")
    print(text.partition("Licences\n---")[0])
    total = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{total:,} bytes in {args.out}")
    assert total <= MAX_BYTES, f"more than {MAX_BYTES:,} bytes"


if __name__ == "__main__":
    main()
