"""`make gpu-gate`: compile the steps for an H200 where there is none, and refuse what would make them slower.

`python -m tests.gpu_gate` needs the packages of constraints-gpu.txt. No kernel runs, no weight exists.
"""
