"""From the tensors of a checkpoint to encoded ones: which codec, in which order, at what cost."""
