"""Names of tensors by table, whatever the layer."""

from __future__ import annotations

import re

from cheaper.errors import UserError


def rename(name: str, names: dict[str, str], source: str) -> str:
    """The other name of a tensor.

    Args:
        name: Such as ``blocks.3.norm.weight``.
        names: From one pattern to the other, such as ``blocks.{}.norm.weight``.
        source: Where the tensor comes from, for errors.

    Raises:
        UserError: The tensor is in no pattern.
    """
    layer = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(layer[0], ".{}.", 1) if layer else name
    if pattern not in names:
        raise UserError(f"{source}: tensor {name} has no place in the decoder")
    return names[pattern].format(layer[1] if layer else "")
