"""Figures of the pages as SVG: leads over CLIP with their intervals, readable on a
light page and on a dark one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from matplotlib import pyplot, rc_context
from matplotlib.axes import Axes

COLOURS = {"cloob": "#d1495b", "infoloob": "#2e86ab", "infonce-hopfield": "#c98a1b"}
"""Method -> colour, the same in every figure."""
_GREY = "#808080"
"""Of text and axes: on white and on black nearly the same contrast."""
_STYLE = {
    "text.color": _GREY,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "font.size": 9.5,
    "svg.fonttype": "none",
}


class Lead(NamedTuple):
    """A mean difference in points and its 95 % interval."""

    mean: float
    low: float
    high: float


class Panel(NamedTuple):
    """One panel of a forest plot: label of a row -> method -> its lead over CLIP."""

    title: str
    rows: Mapping[str, Mapping[str, Lead]]


def over_shares(
    path: Path, leads: Mapping[str, Mapping[float, Lead]], names: Mapping[str, str]
) -> None:
    """Each method's lead over the share of wrong captions, its interval as a band; CLIP
    is the line at zero.
    """
    numbers = []
    with _drawing(path, 1, (5.6, 3.2), numbers) as (axes,):
        axes.axhline(0, color=_GREY, linewidth=1)
        beside = axes.get_yaxis_transform()
        axes.text(1.01, 0, "CLIP", color=_GREY, va="center", transform=beside)
        for method, by_share in leads.items():
            shares = [100 * share for share in by_share]
            drawn = list(by_share.values())
            means = [lead.mean for lead in drawn]
            low = [lead.low for lead in drawn]
            high = [lead.high for lead in drawn]
            colour = COLOURS[method]
            axes.plot(shares, means, "o-", color=colour, label=names[method])
            axes.fill_between(shares, low, high, color=colour, alpha=0.2, linewidth=0)
            for share, lead in zip(shares, drawn, strict=True):
                numbers.append(_as_text(names[method], f"{share:g} % wrong", lead))
        axes.set(xlabel="wrong captions, %", ylabel="ahead of CLIP, points")
        axes.legend(
            frameon=False,
            labelcolor=_GREY,
            ncols=len(leads),
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
        )


def forest(path: Path, panels: Sequence[Panel], names: Mapping[str, str]) -> None:
    """Rows of dots with intervals; all panels have the same rows and one scale."""
    numbers = []
    labels = list(panels[0].rows)
    height = 1.3 + 0.34 * len(labels)
    with _drawing(path, len(panels), (6.4, height), numbers) as drawn:
        for axes, panel in zip(drawn, panels, strict=True):
            axes.axvline(0, color=_GREY, linewidth=1)
            _draw_dots(axes, panel, names)
            for label, leads in panel.rows.items():
                for method, lead in leads.items():
                    where = f"{label}, {panel.title}"
                    numbers.append(_as_text(names[method], where, lead))
            axes.set_title(panel.title, color=_GREY, fontsize=10)
            axes.set_xlabel("ahead of CLIP, points")
            axes.locator_params(axis="x", nbins=7)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
        handles, methods = drawn[0].get_legend_handles_labels()
        drawn[0].figure.legend(
            handles,
            methods,
            frameon=False,
            labelcolor=_GREY,
            ncols=len(methods),
            loc="outside upper center",
        )


def _draw_dots(axes: Axes, panel: Panel, names: Mapping[str, str]) -> None:
    """A dot and its interval for each row and method; the methods of a row stand one
    above the other.
    """
    methods = list(next(iter(panel.rows.values())))
    for place, method in enumerate(methods):
        shift = 0.16 * (2 * place - len(methods) + 1)
        leads = [by_method[method] for by_method in panel.rows.values()]
        means = [lead.mean for lead in leads]
        below = [lead.mean - lead.low for lead in leads]
        above = [lead.high - lead.mean for lead in leads]
        axes.errorbar(
            means,
            [row + shift for row in range(len(leads))],
            xerr=[below, above],
            fmt="o",
            markersize=4,
            color=COLOURS[method],
            label=names[method],
        )


def _as_text(name: str, where: str, lead: Lead) -> str:
    return f"{name}, {where}: {lead.mean:+z.1f} ({lead.low:+z.1f} … {lead.high:+z.1f})"


@contextmanager
def _drawing(
    path: Path, n_panels: int, inches: tuple[float, float], numbers: Sequence[str]
) -> Iterator[list[Axes]]:
    """Axes to draw into. The file holds ``numbers`` as its description, no date, and no
    names by chance.
    """
    pyplot.switch_backend("Agg")
    with rc_context({**_STYLE, "svg.hashsalt": path.name}):
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
        about = {"Date": None, "Description": "; ".join(numbers)}
        figure.savefig(path, transparent=True, metadata=about)
        pyplot.close(figure)
