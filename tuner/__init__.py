"""Decides: workload, cluster and layout to rules, space, prediction, search and sweep. Starts no process."""
