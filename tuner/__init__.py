"""The part of megatune that decides: it plans, predicts, searches and reports, and starts no process and imports no
torch.
"""
