"""What runs inside a trial. A program reads a TrialSpec, writes a TrialResult, and imports only `tuner.trial`."""
