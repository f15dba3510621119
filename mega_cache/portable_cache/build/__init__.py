"""What only a build runs: warm up, compile the decode step, pin tuned kernels, save, verify."""
