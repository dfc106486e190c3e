"""Shows a sweep in MLflow, a view that can be rebuilt from the trial folders at any time. No sweep waits for MLflow."""
