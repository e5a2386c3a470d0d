"""What --json writes at least: the keys that a published result is read by."""

REPORT = {"device", "driver", "versions", "commit", "date", "command", "ceilings", "rows"}
CEILINGS = {"read_bytes_per_s", "dense_flops_per_s"}
ROW = {
    "model", "phase", "batch", "context", "ms", "spread", "tokens_per_s", "floor_ms", "roofline_fraction",
    "peak_bytes", "launches",
}  # fmt: skip
