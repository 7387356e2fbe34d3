"""Self-evolving visual reasoning from unlabeled images (iReasoner, arXiv 2601.05877)."""

__version__ = "0.2.0"
