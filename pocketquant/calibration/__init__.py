"""What is learnt from running a model over texts.

importance          importance matrices, llama.cpp's files
imatrix             one made by running a model
statistics          Hessians and Fisher matrices in one file, read; statistics_writing: written and merged
statistics_run      Hessians, made by running a model in as many passes as memory asks for; hessian: the sums
collecting          statistics of inputs, and of gradients too, with settings as a value
fisher              Fisher matrices of outputs, from gradients, with torch; layer_states: what lies between the layers
torch_layers        transformers' layers with an opened model's weights
"""
