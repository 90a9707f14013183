"""One file per algorithm. Each holds ``METHOD``."""
