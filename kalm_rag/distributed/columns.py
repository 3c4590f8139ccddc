"""The columns of a batch, whatever library they come from, as lists."""

from __future__ import annotations

from typing import Any

from kalm_rag.utils.display import short_repr

_TO_LIST = ("to_pylist", "to_list", "tolist")
"""What makes a list of a column: of pyarrow and Daft, of pandas and Polars, and of numpy."""


def read_columns(batch: Any, names: tuple[str, ...]) -> list[list[Any]]:
    """Return columns of a batch as lists of equal length; the batch is not changed.

    Args:
        batch: columns by name: a mapping, a pyarrow table or a data frame. A column is a list, a numpy or pyarrow
            array, a series, or any other iterable.
        names: which columns.

    Raises:
        TypeError: it is no such batch, or a column is no column.
        ValueError: a column is missing, or the lengths differ.
    """
    present = getattr(batch, "column_names", None)  # of pyarrow and Daft; `columns` of a table are the data
    if present is None:
        present = batch.keys() if hasattr(batch, "keys") else None
    if present is None or not hasattr(batch, "__getitem__"):
        msg = (
            "a batch must hold columns by name, such as {'id': [...], 'text': [...]}, "
            f"got {type(batch).__name__}: {short_repr(batch)}"
        )
        raise TypeError(msg)
    known = list(present)
    for name in names:
        if name not in known:
            msg = (
                f"the batch has no column {name!r}; its columns are {sorted(map(str, known))[:10]}: name the right "
                "ones with id_column= and text_column="
            )
            raise ValueError(msg)
    found = [_as_list(name, batch[name]) for name in names]
    if len({len(column) for column in found}) > 1:
        lengths = ", ".join(f"{name}: {len(column)}" for name, column in zip(names, found, strict=True))
        msg = f"the columns of a batch must have one length, got {lengths}"
        raise ValueError(msg)
    return found


def _as_list(name: str, column: Any) -> list[Any]:
    if isinstance(column, (str, bytes)) or not hasattr(column, "__iter__"):
        msg = f"column {name!r} must be a list, an array or a series, got {type(column).__name__}: {short_repr(column)}"
        raise TypeError(msg)
    for method in _TO_LIST:
        if hasattr(column, method):
            return list(getattr(column, method)())
    return list(column)
