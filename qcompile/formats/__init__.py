"""One file per checkpoint format. Each holds ``FORMAT``."""
