"""Heads for two matrices whose rows belong together: in closed form, by a loop, chosen.

Two matrices in memory or mapped, one process, seconds to minutes. ``fit_heads``,
``fit_closed_form`` and ``choose`` all return a ``FittedHeads``.
"""
