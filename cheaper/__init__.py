"""MobileLLM-R1's training recipe on MosaicML Composer: from raw text to a reasoning model, on a laptop or a cluster."""

__version__ = "0.1.0"
