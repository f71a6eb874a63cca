"""Our MoE layer and the engines users would run instead, interleaved in one run.

Modules below `worker` run under another interpreter too, which has neither torch nor this package: there the folder is
imported as the package `peers` (see `session.py`). So they import one another relatively, and numpy, and nothing else
of kt_kernel.
"""
