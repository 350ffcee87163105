"""Settings under which the programs of the tests compile fast: compilation takes nearly all of their time."""

# Unoptimised code, and of jax 0.10 the older way to emit loops. Both together compile twice as fast.
FAST = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
