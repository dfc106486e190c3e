"""Watches a running job and judges how it ended: heartbeats, limits, logs, telemetry, evidence.

This room starts no process.
"""
