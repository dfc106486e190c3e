"""The nouns of a training job: workload, cluster, layout, and how layers lie on pipeline stages.

This room knows nothing of validity, predictions, trials or files on disk.
"""
