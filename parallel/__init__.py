"""Context parallelism: the mesh, the layout of a row over ranks, and differentiable communication.

context.py    ContextParallel (what a caller chooses) and Shard (what one rank holds of a row)
layout.py     which tokens each rank holds: contiguous, zigzag
mesh.py       data x ring x Ulysses and their process groups
comm.py       torch's collectives with gradients, checked sizes and errors that name rank and operation
heads.py      Ulysses: all-to-all between tokens and heads
fetch.py      halos: rows from wherever they are
attention.py  keys round a ring or gathered, merged by log-sum-exp
scan.py       states through the row: affine scan, relay
watch.py      who is missing when a collective fails
traffic.py    bytes that collectives send, counted
"""

from farspan.parallel.context import ContextParallel, Shard
from farspan.parallel.mesh import Mesh

__all__ = ["ContextParallel", "Mesh", "Shard"]
