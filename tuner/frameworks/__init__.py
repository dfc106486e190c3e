"""What other frameworks write and read (scripts, recipes, configs), one room per framework; knows trials, and nothing
of sweeps.
"""
