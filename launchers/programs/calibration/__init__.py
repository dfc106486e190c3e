"""Measures how fast this machine is: matrix products, copies, launches, and collectives in groups of its ranks."""
