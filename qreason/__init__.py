"""qreason: train, judge and measure a small model that reasons, on one GPU or a laptop."""

__version__ = "0.1.0"
