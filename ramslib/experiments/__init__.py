"""Many runs: ablations, and the road of notebooks over them."""
