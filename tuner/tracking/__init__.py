"""MLflow as a view of the trial folders; it can be rebuilt from them at any time, and the sweep never waits for it."""
