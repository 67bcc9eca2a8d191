"""The calls of modules in a forward pass, as torch.export traces them, and in both modes. Imports: graph."""
