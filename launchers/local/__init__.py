"""Runs jobs on this machine, under a new torchrun or as forks of a process that has imported torchrun and the program.

It knows no other machine.
"""
