"""Pages, tables and figures from run directories alone."""

from ireasoner.page.page import write_report

__all__ = ["write_report"]
