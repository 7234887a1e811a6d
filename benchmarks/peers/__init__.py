"""One program a peer, and `ours`: each measures itself, in a Python of its own, as `benchmarks.common` says."""
