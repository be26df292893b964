"""Controllers nobody has read, run in processes the kernel holds, or not at all."""
