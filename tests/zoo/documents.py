"""Document readers and small models: DeepSeek-OCR, MiniCPM, Granite, Ovis and others."""

from __future__ import annotations
