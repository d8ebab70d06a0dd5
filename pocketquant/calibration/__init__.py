"""What is learnt from running a model over texts: importance matrices, Hessians and Fisher matrices.

importance          importance matrices: llama.cpp's files, read, written and merged
imatrix             makes an importance matrix by running a model
statistics          reads a file of Hessians and Fisher matrices; statistics_writing writes and merges such files
statistics_run      makes the Hessians of inputs by running a model; hessian sums them, saved_sums keeps them on disk
collecting          makes both for the command line and for Python, with settings as a value
fisher              makes the Fisher matrices of outputs from gradients, with torch; layer_states keeps them on disk
torch_layers        transformers' layers with the weights of an opened model
"""
