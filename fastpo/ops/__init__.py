"""The torch ops, one file each: schema, shapes for tracing, autograd, allocation and checks."""
