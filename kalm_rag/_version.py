"""The version of the `kalm-rag` distribution."""

__version__ = "0.1.0"
