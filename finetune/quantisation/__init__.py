"""INT8: quantisation-aware training and quantisation after training, as a graph with Q/DQ beside the float model."""
