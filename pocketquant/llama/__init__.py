"""All code that uses llama.cpp's library; the only place that imports `llama_cpp`."""
