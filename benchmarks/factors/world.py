"""A world that is known to the last number: pictures of factors, and captions that name
some of them.

A thing has F factors (shape, colour, place, …) of V values each. Every value has a code
in pictures and another one in captions: fixed random directions. A picture is the sum
of the codes of all its factors, mixed by a fixed random layer, with noise. A caption is
the sum of the codes of the factors that it names, mixed by a layer of its own. The
first factor is loud in pictures and the last one faint, so that some are easy to see
and some are hard.

    values   (n, F)   what is so          pictures (n, P)   how it looks
    named    (n, F)   what is said        captions (n, C)   how it is said

Everything is drawn from one seed: codes, layers, things, noise, and which captions are
swapped."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FACTORS = 8
VALUES = 10
PIXELS = 96
LETTERS = 96
"""P and C: the lengths of a picture and of a caption."""
FAINTEST = 0.4
"""How loud the last factor is where the first one is 1; the others lie between, in
equal ratios.
"""
GRAIN = 0.5
"""Standard deviation of the noise on a picture, of which a pixel has 1 without it."""


@dataclass(frozen=True)
class World:
    """What is varied.

    One of these and a seed make all pairs.

    Attributes:
        wrong: Share of the pairs whose caption is another pair's, held-out pairs
            included. Exact.
        pool: Training pairs, seen over and over until ``seen`` pairs were: 128,000 are
            a stream without repeats.
        batch: Pairs a step.
        named: Probability that a caption names a factor; it names at least one.
        correlation: Probability that a factor of odd place has the value of the one
            before it.
        seen: Pairs that a run trains on, repeats included.
        held_out: Pairs beside the pool, equally noisy: what a user can choose by.
        pictures: Labelled pictures to probe with, and as many to test with. Their
            factors are independent.
    """

    wrong: float = 0.0
    pool: int = 4000
    batch: int = 128
    named: float = 0.5
    correlation: float = 0.0
    seen: int = 128_000
    held_out: int = 2000
    pictures: int = 2000


@dataclass
class Pairs:
    """n pictures and captions, the values that the pictures show, and which captions
    are another pair's.
    """

    pictures: Tensor
    captions: Tensor
    values: Tensor
    wrong: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def first(self, n: int) -> Pairs:
        parts = (self.pictures, self.captions, self.values, self.wrong)
        return Pairs(*(part[:n] for part in parts))


@dataclass
class Sample:
    """One drawing of a world: its pairs, its labelled pictures, and for each value the
    caption that names it alone.

    Attributes:
        train: The pool.
        held_out: Pairs of the same kind.
        test: Pictures to judge by, and their (n, F) values.
        prompts: (F, V, C).
    """

    train: Pairs
    held_out: Pairs
    test: tuple[Tensor, Tensor]
    prompts: Tensor


def draw(world: World, seed: int) -> Sample:
    nature = Nature(torch.Generator().manual_seed(seed))
    train = nature.pairs(world, world.pool)
    held_out = nature.pairs(world, world.held_out)
    # The first of two draws was there to fit probes on; the second stays what it was.
    nature.labelled(world.pictures)
    test = nature.labelled(world.pictures)
    values = torch.arange(VALUES)[:, None].expand(VALUES, FACTORS)
    prompts = [
        nature.caption(values, torch.eye(FACTORS)[f].expand(VALUES, -1))
        for f in range(FACTORS)
    ]
    return Sample(train, held_out, test, torch.stack(prompts))


@dataclass
class Nature:
    """The codes and the two layers of a world, and the generator from which all of it
    comes.
    """

    random: torch.Generator
    picture_codes: Tensor = field(init=False)
    caption_codes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        loudness = FAINTEST ** torch.linspace(0, 1, FACTORS)
        loudness /= loudness.norm()
        self.picture_codes = (
            self._normal(FACTORS, VALUES, PIXELS) * loudness[:, None, None]
        )
        self.caption_codes = self._normal(FACTORS, VALUES, LETTERS)
        self.picture_layer = self._normal(PIXELS, PIXELS) / PIXELS**0.5
        self.caption_layer = self._normal(LETTERS, LETTERS) / LETTERS**0.5

    def things(self, n: int, correlation: float) -> Tensor:
        """(n, F) values."""
        values = torch.randint(VALUES, (n, FACTORS), generator=self.random)
        follows = torch.rand(n, FACTORS // 2, generator=self.random) < correlation
        values[:, 1::2] = torch.where(follows, values[:, ::2], values[:, 1::2])
        return values

    def names(self, n: int, probability: float) -> Tensor:
        """(n, F) zeros and ones: which factors each caption names, at least one."""
        named = torch.rand(n, FACTORS, generator=self.random) < probability
        one = torch.randint(FACTORS, (n,), generator=self.random)
        named[torch.arange(n), one] |= ~named.any(1)
        return named.float()

    def picture(self, values: Tensor) -> Tensor:
        """(n, P) pictures of things."""
        codes = self.picture_codes[torch.arange(FACTORS), values].sum(1)  # (n, P)
        return torch.tanh(2 * codes @ self.picture_layer) + GRAIN * self._normal(
            len(values), PIXELS
        )

    def caption(self, values: Tensor, named: Tensor) -> Tensor:
        """(n, C) captions that name these factors of things."""
        codes = (
            self.caption_codes[torch.arange(FACTORS), values] * named[:, :, None]
        ).sum(1)  # (n, C)
        return torch.tanh(codes @ self.caption_layer)

    def labelled(self, n: int) -> tuple[Tensor, Tensor]:
        """n pictures of things with independent factors, and their values."""
        values = self.things(n, correlation=0.0)
        return self.picture(values), values

    def pairs(self, world: World, n: int) -> Pairs:
        values = self.things(n, world.correlation)
        named = self.names(n, world.named)
        pictures = self.picture(values)
        captions = self.caption(values, named)
        swapped = torch.randperm(n, generator=self.random)[: round(world.wrong * n)]
        captions[swapped] = captions[swapped.roll(1)]
        return Pairs(
            pictures,
            captions,
            values,
            torch.zeros(n, dtype=torch.bool).index_fill(0, swapped, True),
        )

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)
