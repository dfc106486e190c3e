"""What every rank does around its training: records, heartbeats, timed steps, memory; knows no framework."""
