"""The nouns of a training job: workload, cluster, layout, and how the layers are divided among the pipeline stages.

This room knows nothing of validity, predictions, trials or files on disk.
"""
