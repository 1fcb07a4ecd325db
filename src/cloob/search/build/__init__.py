"""From sources to an index: ``plan`` compares, ``prepare`` reads and decodes, ``carry`` embeds and writes."""

from cloob.search.build.plan import Effort as Effort
from cloob.search.build.plan import Summary as Summary
