"""What the stages run on: operators, the choice between PyTorch and Triton, kept tensors, versions of torch."""
