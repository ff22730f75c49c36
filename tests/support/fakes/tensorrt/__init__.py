"""TensorRT, CUDA and the driver, simulated on a CPU."""
