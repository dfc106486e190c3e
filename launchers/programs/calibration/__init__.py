"""Measures what this machine does: products, copies, launches, and collectives in groups of its ranks."""
