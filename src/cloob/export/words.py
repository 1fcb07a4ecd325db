"""What can be wrong with the words of ``cloob export`` and ``cloob push``, found without importing torch."""

from __future__ import annotations

import re

from cloob.errors import InputError, nearest

_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
"""As the hub spells them (huggingface.co/docs/hub/repositories-licenses)."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_license(name: str | None) -> str | None:
    """A licence as the hub spells it.

    Raises:
        InputError: The hub does not know it.
    """
    if name is None:
        return None
    spelled = name.strip().lower()
    if spelled not in LICENSES:
        raise InputError(f"--license {name}: the hub has no such licence; {nearest(spelled, LICENSES)} (or other)")
    return spelled


def check_repository(name: str) -> None:
    """Refuses a name that the hub has not.

    Raises:
        InputError: It is not ``ORG/NAME`` of letters, digits, ``-``, ``_`` and ``.``.
    """
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise InputError(f"{name}: ORG/NAME is wanted, of letters, digits, '-', '_' and '.'")
