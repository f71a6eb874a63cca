"""python -m kt_kernel.bench: measured ratios against the limits of this machine."""
