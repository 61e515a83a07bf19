"""Sparse models at the size they deserve: the packed form of a safetensors file. docs/format.md has the format."""
