"""What the CPU is, and how code for it is made: instructions, vectors, compiling, threads, memory."""
