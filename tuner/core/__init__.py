"""The nouns of a training job (workload, cluster, layout, how layers lie on stages); knows nothing of validity,
predictions, trials or files on disk.
"""
