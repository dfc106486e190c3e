"""The predicted time of one optimizer step, in milliseconds, from the work of each layer and the bytes of each message.

This room does not check whether a layout fits into memory; tuner/predict/memory predicts that.
"""
