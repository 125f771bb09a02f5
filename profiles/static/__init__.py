"""Static analysis of compiled kernels: registers, spills, SASS, pipelines. Needs no GPU."""
