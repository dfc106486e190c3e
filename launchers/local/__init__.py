"""Runs jobs on this machine alone, under torchrun or forked from a process that knows it; knows no other machine."""
