"""Beyond one device: which part of every weight a rank holds, how it reads that part alone, and who talks when.

``dataflow`` finds what must stay together, ``dividing`` and ``sharding`` decide for a plan, ``slices`` and ``loading``
read, ``layers`` compute. The launcher, the transport and the meshes are those of ``torch.distributed``.
"""
