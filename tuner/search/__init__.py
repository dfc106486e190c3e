"""Which row of the table comes next, and when searching more is pointless; knows predictions and measurements, and
nothing of folders or processes.
"""
