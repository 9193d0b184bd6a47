"""The typed schema of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Optional  # noqa: UP035  OmegaConf reads these annotations at run time on Python 3.10


@dataclass
class ModelConfig:
    """Shape of a dense decoder. Sizes are in units (features, heads, tokens)."""

    name: str = "???"
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    head_dim: int = 64
    vocab_size: int = 128256
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    initializer_std: float = 0.02
    use_flash_attention: bool = True


@dataclass
class SourceConfig:
    """Where the raw rows of one stream come from: exactly one of ``path`` and ``dataset``."""

    path: Optional[str] = None  # file, folder or glob: JSONL (.gz .zst .bz2), Parquet, text
    dataset: Optional[str] = None  # Hugging Face dataset id
    subset: Optional[str] = None  # its configuration name
    data_dir: Optional[str] = None  # folder inside the dataset repository
    split: str = "train"


@dataclass
class StreamConfig:
    """One stream of a mixture."""

    proportion: float = 0.0  # share of the mixture's tokens; any scale, normalised over the streams
    source: SourceConfig = field(default_factory=SourceConfig)
    format: str = "text"  # a name in cheaper.data.formats
    field: str = "text"  # the column that format "text" reads


@dataclass
class DataConfig:
    name: str = "???"
    root: str = "???"  # folder or URL with one folder of MDS shards per stream
    tokenizer: str = "???"  # folder, hub id or tiktoken .model file
    streams: Dict[str, StreamConfig] = field(default_factory=dict)
    intra_document_attention: bool = False
