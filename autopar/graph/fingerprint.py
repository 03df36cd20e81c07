"""A short name for what a plan depends on of a model."""

from __future__ import annotations

import hashlib
import json

from autopar.graph.model_graph import ModelGraph


def model_fingerprint(graph: ModelGraph) -> str:
    """A hash of the parameters (names, shapes, ties) and of the chain with each block's ops.

    It does not change with the batch size, the sequence length or the dtype.
    """
    content = {
        "params": sorted((info.name, info.shape) for info in graph.params),
        "aliases": sorted(graph.aliases),
        "blocks": [(block.name, block.cls, block.params) for block in graph.blocks],
        "classes": {cls.name: [op.target for op in cls.ops] for cls in graph.classes
                    if any(block.cls == cls.name for block in graph.blocks)},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
