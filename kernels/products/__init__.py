"""What every product shares: the micro-kernel, its driver, packed weights, rounded operands."""
