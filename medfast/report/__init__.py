"""Reports: single HTML files that need nothing beside them."""

from medfast.report.run import AttentionExample, ContactExample, write_report

__all__ = ["AttentionExample", "ContactExample", "write_report"]
