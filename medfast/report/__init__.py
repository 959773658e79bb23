"""The report of one training run: a single HTML file that needs nothing beside it."""

from medfast.report.page import AttentionExample, ContactExample, write_report

__all__ = ["AttentionExample", "ContactExample", "write_report"]
