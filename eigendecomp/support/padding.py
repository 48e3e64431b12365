"""One convention for padding: a table's row at ``padding_idx`` has no derivative in a lookup, forwards or backwards.

torch's backward pass leaves this row out of the table's gradient, but its forward derivative moves it. A table's other
uses, as the layer that reads the outputs, differentiate all of its rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class StillPadding(TorchFunctionMode):
    """Inside, lookups give padded tokens a row without derivative, whatever the table is set to.

    Args:
        tables: pairs of a table, as lookups are given it, and the table that padded tokens are read from. From any
            other table they are read as it is, detached.
    """

    def __init__(self, *tables: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.tables, self.before = tables, {key(table): before for table, before in tables}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = dict(kwargs or {})
        rows = func(*args, **kwargs)
        if func is F.embedding:
            return self.still(rows, **dict(zip(("input", "weight", "padding_idx"), args)) | kwargs)
        if func is torch.embedding:
            given = dict(zip(("weight", "indices", "padding_idx"), args)) | kwargs
            if given.get("padding_idx", -1) >= 0:
                return self.still(rows, given["indices"], given["weight"], given["padding_idx"])
        return rows

    def still(
        self,
        rows: Float[Tensor, "*tokens d"],
        input: Int[Tensor, "*tokens"],
        weight: Float[Tensor, "vocabulary d"],
        padding_idx: int | None = None,
        **options: Any,
    ) -> Float[Tensor, "*tokens d"]:
        """The rows that a lookup gave, those of padded tokens replaced."""
        if padding_idx is None:
            return rows
        padding_idx %= len(weight)
        table = self.before.get(key(weight))
        row = rows.detach() if table is None or table.shape != weight.shape else table[padding_idx].detach()
        return torch.where((input == padding_idx).unsqueeze(-1), row.to(rows.dtype), rows)


def key(tensor: Tensor) -> int:
    """What tells tensors apart: where they lie in memory, or, inside a transform of torch.func, the object."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return id(tensor)
