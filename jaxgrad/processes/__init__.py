"""Several processes that share one run.

`place` finds this process among them, `runtime` connects it to JAX's distributed runtime, `group` holds
its membership and how it ends, `exchange` shares the values of one run, `stopping` handles SIGTERM.
"""
