"""Bytes and launches of one training step on a GPU, counted on a processor that has none.

    python -m benchmarks.bytes                            ViT-L/16, 64 images of 2 x 224 + 8 x 96 px, eager and compiled
    python -m benchmarks.bytes --label NAME               also kept, in benchmarks/results/bytes.jsonl and bytes.md
    python -m benchmarks.bytes --config NAME key=value    another step

The real `Phase.step` runs on fake CUDA tensors, which have shapes and no values. An operator that is run by itself is
one kernel that reads its inputs and writes its outputs once (`count`). What `execution.compile` compiles goes through
Inductor up to its scheduler, whose fused kernels count as the scheduler reckons their buffers (`compiled`). Backward
passes run in Python (`backward`), for the engine in C++ asks a driver for streams. Caches are left out: what a second
kernel finds in the 50 MB of an H100's L2 counts again. Time is not measured here.
"""
