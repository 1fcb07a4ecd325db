"""Whether the offsets and indices of Arrow columns lead into their own data; pyarrow follows them wherever they lead.

Offsets are read, 4 or 8 bytes a row; what they lead to is not: pictures may be a terabyte, and whether a caption is
UTF-8 is its row's own matter. To that end columns are looked at as if they held bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pyarrow as pa

_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def checked(table: pa.Table) -> pa.Table:
    """The table itself.

    Raises:
        pa.ArrowInvalid: What a row refers to is not there; or text in unions, views of lists or runs is not UTF-8.
    """
    table.validate()  # the sizes of all buffers, on which what follows relies
    for column in table.columns:
        kind = _as_bytes(column.type)
        for chunk in column.chunks:
            try:
                viewed = chunk.view(kind)
            except pa.ArrowException:  # a kind of which there is no view
                viewed = chunk
            viewed.validate(full=True)
    return table


@contextlib.contextmanager
def names_in_utf8() -> Iterator[None]:
    """Where pyarrow comes across a name of a column that is not UTF-8, pa.ArrowInvalid."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"a name of a column is not UTF-8: {error.object[:60]!r}") from None


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The kind of the same layout whose values may be anything."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _as_bytes(kind.storage_type)
    if types.is_temporal(kind) or types.is_decimal(kind):
        return pa.binary(kind.bit_width // 8)
    if types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(_as_bytes(kind.key_type), _as_bytes(kind.item_type))
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _as_bytes(kind.value_type), kind.ordered)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        held = kind.value_field.with_type(_as_bytes(kind.value_type))
        if types.is_fixed_size_list(kind):
            return pa.list_(held, kind.list_size)
        return pa.list_(held) if types.is_list(kind) else pa.large_list(held)
    return _BYTES.get(kind, kind)
