"""Every stage's speed beside a limit or a peer: ``python -m benchmarks`` or ``make bench``."""
