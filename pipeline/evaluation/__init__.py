"""Evaluation: metrics, calibration, out-of-distribution detection, robustness, data audits."""
