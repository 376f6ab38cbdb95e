"""Context parallelism: mesh, sequence layout and differentiable communication primitives."""
