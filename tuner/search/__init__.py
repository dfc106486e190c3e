"""Which row of the table is measured next, and when further search is pointless. Knows predictions and measurements;
knows neither folders nor processes.
"""
