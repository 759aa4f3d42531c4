"""The steps between terms and a rewritten graph. No step imports another; `pipeline.py` has their order."""
