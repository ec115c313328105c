"""Many runs: sweeps, comparisons, and the notebooks over them."""
