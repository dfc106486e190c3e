"""Which row of the table to try next: the sampler, and the rows that a measured OOM rules out."""
