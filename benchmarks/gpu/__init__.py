"""Everything worth knowing about one GPU, in one command of at most seven and a half minutes.

    python -m benchmarks.gpu --out FOLDER                              every section, on a GPU
    python -m benchmarks.gpu --out FOLDER --sections B,F --minutes 2   two of them
    python -m benchmarks.gpu --out FOLDER --device cpu                 all of it on a processor, at tiny sizes
    python -m benchmarks.gpu.report FOLDER                             tables, kept under benchmarks/results/

Each section is a process of its own with its own share of the time (`table.SECTIONS`). It appends a line of JSON to
FOLDER/results.jsonl as soon as it has measured something; one that fails leaves its traceback, one that takes too long
is killed with its children, and the next one runs. What everything printed is in FOLDER/log.txt. Sections call the
project's own code: `Phase.step`, the losses, `pretrain.train`, `curation.ops`, the encoders.

References for parity are computed on the processor in the same section, in float64 where the operation allows it. At
shapes this small that costs a second or two of the GPU's time, and there is no file of golden tensors that could be
of another version than the code.

On a machine that is lent for minutes:

1. Before, on a processor: `python -m benchmarks.gpu --out dry --device cpu`, and mend what does not end "ok".
2. Find out what the machine lacks: `python -m benchmarks.gpu --out a --sections A` there, or its list of packages.
   Section A names the packages that are needed and not installed. B, C, F to J need omegaconf, simplejpeg, braceexpand;
   K needs Faiss, numba and scipy, on the processor. A section that lacks one says so and the rest runs.
3. A machine without a network takes them along as wheels:
       pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
           --platform manylinux_2_17_x86_64 -d wheels omegaconf simplejpeg braceexpand faiss-cpu      # 20 MB
   and there: `python3 -m pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=site`.
4. One command, its limit a minute above the benchmark's, so that what it found comes back whatever happens:
       python3 -m benchmarks.gpu --out OUT --images cifar.tar --revision "$(git rev-parse HEAD)"
   Write the revision out where the machine has no git. OUT ends with two files, results.jsonl and log.txt.
5. Afterwards, in the repository: `python -m benchmarks.gpu.report OUT`, read it, and commit what it kept.

One section by hand: `python -m benchmarks.gpu.section B --device cuda --out FOLDER --work work --seconds 25`.
"""
