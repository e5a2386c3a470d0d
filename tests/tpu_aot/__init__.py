"""`make aot`: compile decode steps and prefill chunks for TPUs, where there are none, against a table of what came out.

`python -m tests.tpu_aot` needs the extra `tpu` (libtpu, which compiles on any machine). Nothing runs, no weight exists.
"""
