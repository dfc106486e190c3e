"""Writes texts, tables and pages that show a sweep to its user. This room knows the answer and decides nothing."""
