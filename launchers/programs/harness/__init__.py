"""What the programs of a trial share: a rank's start, report and end, timed steps, memory, and Megatron-Core on CPU.

This room knows the contract of a trial, torch and Megatron-Core; it knows no program.
"""
