"""Which layouts are valid: one object per rule. Knows nothing of predictions, of trials or of what was measured."""
