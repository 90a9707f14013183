"""One folder per device. Each holds ``BACKEND``: its kernels, best first."""
