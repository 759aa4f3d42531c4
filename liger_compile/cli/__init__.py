"""The commands of `python -m liger_compile`, one file each."""
