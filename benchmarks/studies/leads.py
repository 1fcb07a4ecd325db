"""Figures of the pages as SVG: leads over CLIP with their intervals, readable on a
light page and on a dark one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

COLOURS = {"cloob": "#d1495b", "infoloob": "#2e86ab", "infonce-hopfield": "#c98a1b"}
"""Method -> colour, the same in every figure."""
_GREY = "#808080"
"""Of text and axes: on white and on black nearly the same contrast."""


class Lead(NamedTuple):
    """A mean difference in points and its 95 % interval."""

    mean: float
    low: float
    high: float


class Row(NamedTuple):
    """A row of a forest plot: what it says at its left, and a method's lead over CLIP
    in each panel.
    """

    label: str
    leads: Sequence[Mapping[str, Lead]]


def lines(
    path: Path, leads: Mapping[str, Mapping[float, Lead]], names: Mapping[str, str]
) -> None:
    """Each method's lead over the share of wrong captions, its interval as a band; CLIP
    is the line at zero.
    """
    said = [
        _said(names[method], f"{100 * share:g} % wrong", lead)
        for method, by_share in leads.items()
        for share, lead in by_share.items()
    ]
    with _drawing(path, said, 1, (5.6, 3.2)) as (axes,):
        axes.axhline(0, color=_GREY, linewidth=1)
        axes.text(
            1.01,
            0,
            "CLIP",
            color=_GREY,
            ha="left",
            va="center",
            transform=axes.get_yaxis_transform(),
        )
        for method, by_share in leads.items():
            shares, drawn = [100 * share for share in by_share], list(by_share.values())
            axes.plot(
                shares,
                [lead.mean for lead in drawn],
                "o-",
                color=COLOURS[method],
                label=names[method],
            )
            bounds = [lead.low for lead in drawn], [lead.high for lead in drawn]
            axes.fill_between(
                shares, *bounds, color=COLOURS[method], alpha=0.2, linewidth=0
            )
        axes.set(xlabel="wrong captions, %", ylabel="ahead of CLIP, points")
        axes.legend(
            frameon=False,
            labelcolor=_GREY,
            ncols=len(leads),
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
        )


def forest(
    path: Path, titles: Sequence[str], rows: Sequence[Row], names: Mapping[str, str]
) -> None:
    """Rows of dots with intervals, a panel for each of ``titles`` over one scale."""
    methods = list(
        dict.fromkeys(method for row in rows for lead in row.leads for method in lead)
    )
    said = [
        _said(names[method], f"{row.label}, {title}", lead)
        for row in rows
        for title, of_panel in zip(titles, row.leads, strict=True)
        for method, lead in of_panel.items()
    ]
    with _drawing(path, said, len(titles), (6.4, 1.3 + 0.34 * len(rows))) as panels:
        for i, (axes, title) in enumerate(zip(panels, titles, strict=True)):
            axes.axvline(0, color=_GREY, linewidth=1)
            for k, method in enumerate(methods):
                shift = 0.16 * (2 * k - len(methods) + 1)
                found = [
                    (at + shift, row.leads[i][method])
                    for at, row in enumerate(rows)
                    if method in row.leads[i]
                ]
                at, means = [y for y, _ in found], [lead.mean for _, lead in found]
                bars = [
                    [lead.mean - lead.low for _, lead in found],
                    [lead.high - lead.mean for _, lead in found],
                ]
                axes.errorbar(
                    means,
                    at,
                    xerr=bars,
                    fmt="o",
                    markersize=4,
                    color=COLOURS[method],
                    label=names[method],
                )
            axes.set_title(title, color=_GREY, fontsize=10)
            axes.set_xlabel("ahead of CLIP, points")
            axes.locator_params(axis="x", nbins=7)
            axes.set_yticks(range(len(rows)), [row.label for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
        handles = panels[0].get_legend_handles_labels()
        options = {
            "frameon": False,
            "labelcolor": _GREY,
            "ncols": len(methods),
            "loc": "outside upper center",
        }
        panels[0].figure.legend(*handles, **options)


def _said(name: str, where: str, lead: Lead) -> str:
    return f"{name}, {where}: {lead.mean:+z.1f} ({lead.low:+z.1f} … {lead.high:+z.1f})"


@contextmanager
def _drawing(
    path: Path, said: Sequence[str], n_panels: int, inches: tuple[float, float]
) -> Iterator[list[Any]]:
    """Axes to draw into; what is drawn goes to ``path`` with its numbers, without a
    date and chance in its names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grey = dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "xtick.color",
            "ytick.color",
        ),
        _GREY,
    )
    with matplotlib.rc_context(
        {**grey, "svg.fonttype": "none", "svg.hashsalt": path.name, "font.size": 9.5}
    ):
        figure, panels = pyplot.subplots(
            1,
            n_panels,
            figsize=inches,
            layout="constrained",
            squeeze=False,
            sharey=True,
            sharex=True,
        )
        for axes in panels.flat:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(visible=True, alpha=0.25, linewidth=0.6)
        yield list(panels.flat)
        figure.savefig(
            path,
            transparent=True,
            metadata={"Date": None, "Description": "; ".join(said)},
        )
        pyplot.close(figure)
