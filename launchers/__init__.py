"""Acts: starts, watches and ends the job of one trial, and holds the programs that run inside it."""
