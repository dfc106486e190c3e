"""The programs that run inside a trial; they import the contract and the nouns, never the tuner's state."""
