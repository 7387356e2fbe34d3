"""The web page about a run, made from its run directory alone."""

from ireasoner.page.page import write_report

__all__ = ["write_report"]
